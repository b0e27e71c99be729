"""Pictures of votes, made again from their keys: the same paths and latents, without any file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from flowalign.batch import Keys, Rollout
from flowalign.data.examples import Drawn, ImageKey, Question, ReadBytes, VoteSource
from flowalign.data.pictures import load_picture
from flowalign.data.prompts import Prompt
from flowalign.errors import UserError
from flowalign.policy import Policy, Sampler
from flowalign.rollouts.collect import collect, make_prompts

TOLERANCE = 4 / 255
"""Largest mean difference between a picture and the one that was voted on."""


def draw(policy: Policy, prompt: Prompt, keys: Sequence[ImageKey]) -> Rollout:
    """Sample the pictures of a question. Equal weights, sampler and keys give equal pictures.

    They are one batch, because other rows would change their rounding.
    """
    rows = Keys.of_rows(list(keys))
    return collect(policy, make_prompts(policy, [prompt] * len(keys), rows), len(keys))


@dataclass
class VotedPictures:
    """Makes the pictures of votes again, and keeps their latents and paths in main memory."""

    policy: Policy
    """The policy under the weights that made the pictures."""
    sampler_of: Callable[[VoteSource], Sampler]
    """Builds the sampler that made the pictures of a vote file."""
    keeps_paths: bool
    _drawn: dict[Question, Rollout] = field(default_factory=dict)
    _checked: set[Drawn] = field(default_factory=set)

    def __call__(self, picture: Drawn, where: str) -> Rollout:
        """Return the rollout of one picture, with one row, on the CPU.

        Raises UserError if the picture was stored and another one comes out.
        """
        if picture.question not in self._drawn:
            question = picture.question
            policy = self.policy.sampling(self.sampler_of(question.source))
            rollout = draw(policy, question.prompt, question.keys)
            rollout = rollout if self.keeps_paths else rollout.without_path()
            self._drawn[picture.question] = on_cpu(rollout)
        rollout = self._drawn[picture.question][picture.row : picture.row + 1]
        if picture.stored and picture not in self._checked:
            check_same(rollout, picture.stored, where)
            self._checked.add(picture)
        return rollout


def on_cpu(rollout: Rollout) -> Rollout:
    """Return the latents and paths of a rollout in main memory, without its embeddings."""
    return replace(
        rollout,
        x0=rollout.x0.cpu(),
        path=rollout.path.cpu(),
        log_prob=rollout.log_prob.cpu(),
        cond=rollout.cond.without_inputs(),
    )


def check_same(rollout: Rollout, stored: ReadBytes, where: str) -> None:
    """Raise UserError if a picture differs from its stored file by more than rounding."""
    height, width = rollout.images.shape[-2:]
    shown = load_picture(stored(), height, width, where)
    difference = float((rollout.images[0].float() / 255 - shown).abs().mean())
    if difference > TOLERANCE:
        raise UserError(
            f"{where}: the picture that is made from its key differs from the stored one by "
            f"{difference * 255:.0f}/255 on average. Train on the machine that made the pictures, "
            "or remove the keys from the votes to learn from the stored pictures."
        )
