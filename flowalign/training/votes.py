"""Votes in a run: may their pictures be made again, and with which sampler?"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from flowalign.config.build import build_sampler
from flowalign.config.resolved import differing, resolve
from flowalign.config.sections import Config
from flowalign.data.examples import Drawn, Example, Picture, VoteSource
from flowalign.errors import UserError
from flowalign.models.base import FlowModel
from flowalign.policy import Policy
from flowalign.rollouts.voted import VotedPictures


def drawn_pictures(examples: Iterable[Example]) -> list[Drawn]:
    """Return the pictures that flowalign made."""
    pictures = (picture for example in examples for picture in example.pictures)
    return [picture for picture in pictures if isinstance(picture, Drawn)]


def sources_of(examples: Iterable[Example]) -> list[VoteSource]:
    """Return the different sources of the pictures that flowalign made."""
    sources: list[VoteSource] = []
    for picture in drawn_pictures(examples):
        if picture.question.source not in sources:
            sources.append(picture.question.source)
    return sources


def check_paths(config: Config, examples: Sequence[Example], key: str) -> None:
    """Refuse votes without paths for an objective that learns from stochastic steps.

    The paths need the run's own sampler, since the loss is that of its steps.
    """
    if not config.objective.needs_stochastic_steps:
        return
    pictures = sum(len(example.pictures) for example in examples)
    if len(drawn_pictures(examples)) < pictures:
        raise UserError(
            f"{key} holds pictures without keys, but {config.objective_name} learns from the steps "
            "of the sampler that led to them. Use votes on pictures that flowalign made "
            "(flowalign label), or objective.name: dpo."
        )
    steps = {key[:2] for picture in drawn_pictures(examples) for key in picture.question.keys}
    if config.sampler.window.size and len(steps) > 1:
        raise UserError(
            f"{key} holds votes of {len(steps)} seeds or rounds, whose windows of stochastic steps "
            "differ. Use one of them, or write sampler.window.size: 0 before you vote."
        )
    own = resolve(config)["sampler"]
    assert isinstance(own, dict)
    for source in sources_of(examples):
        different = differing(source.sampler, own)
        if different:
            raise UserError(
                f"{key}: the pictures were sampled with another sampler.{different[0]}, but "
                f"{config.objective_name} learns from their steps. Copy the sampler section of "
                "the vote file's first line."
            )


def resolved_examples(
    config: Config, examples: Sequence[Example], model: FlowModel, key: str
) -> list[Example]:
    """Return the examples with stored files in place of pictures that the run cannot make again.

    Call it before adapters are put on the model. Raises UserError if there is no file, or if the
    objective needs the path to the picture.
    """
    sources = sources_of(examples)
    if not sources:
        return list(examples)
    if config.distributed.shard:
        raise UserError(
            f"distributed.shard is true, but {key} holds pictures that each process makes again. "
            "Set it to false, or remove the keys from the votes."
        )
    weights, size = model.weights_fingerprint(), (model.config.height, model.config.width)
    foreign = [one for one in sources if (one.weights, (one.height, one.width)) != (weights, size)]

    def resolved(picture: Picture, where: str) -> Picture:
        if not isinstance(picture, Drawn) or picture.question.source not in foreign:
            return picture
        if picture.stored is None or config.objective.needs_stochastic_steps:
            raise UserError(f"{where} {explain(picture.question.source)}")
        return picture.stored

    return [
        replace(
            example,
            chosen=resolved(example.chosen, example.where),
            rejected=example.rejected and resolved(example.rejected, example.where),
        )
        for example in examples
    ]


def explain(source: VoteSource) -> str:
    """Return the words that say which weights a run needs to make voted pictures again."""
    merge = f"[{', '.join(source.merge)}]"
    return (
        "is a vote on pictures of other weights, which this run cannot make again. Set model.path "
        f"to {source.model}, model.merge to {merge}, and model.height and model.width to "
        f"{source.height} and {source.width}."
    )


def voted_pictures(policy: Policy, config: Config) -> VotedPictures:
    """Return what makes the pictures of votes again, under the weights that a run begins with."""
    reference = policy.at("reference")
    # The pictures of a question are one batch here as they were on the page.
    reference.images_per_pass = None
    return VotedPictures(
        reference,
        lambda source: build_sampler(source.sampler),
        keeps_paths=config.objective.needs_stochastic_steps,
    )
