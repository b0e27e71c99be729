"""Make pictures with a model, and with an adapter from the same noise: before and after."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from flowalign import distributed
from flowalign.advantages import ADVANTAGES
from flowalign.bundled import locate
from flowalign.data.prompts import Prompt
from flowalign.errors import UserError
from flowalign.evaluation.evaluator import Evaluator
from flowalign.evaluation.results import EvaluationResult
from flowalign.evaluation.statistics import paired_difference
from flowalign.models import load_model
from flowalign.policy import Policy, Sampler
from flowalign.reporting.header import device_fact, model_fact, plural
from flowalign.rewards.combine import COMBINE
from flowalign.rewards.registry import load_specs
from flowalign.rollouts.scoring import RolloutScorer
from flowalign.runs.adapter import load_adapter
from flowalign.sampling.mixing import mixed_policy
from flowalign.sampling.result import free_folder, next_folder, SampleResult
from flowalign.sampling.sources import default_prompts, enclosing_run, guidance_key, Source
from flowalign.settings.types import Count, Settings
from flowalign.training.setup import assemble, read_inputs

IMAGES_PER_PASS = 16
"""For a model without a run."""


@dataclass
class SampleSettings(Settings):
    """How many pictures to make, and how. Raises WrongSetting for a value out of range."""

    images: Count = 1
    """Pictures per prompt."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """First part of the key that all noise is drawn from."""
    steps: Count | None = None
    """Sampler steps; those of the source if None."""
    guidance: float | None = None
    """Guidance scale; that of the source if None."""
    negative_prompt: str | None = None
    """Text that guidance leads away from; that of the source if None."""
    rewards: tuple[str, ...] = ()
    """Rewards that score the pictures, as the command line names them."""
    strengths: tuple[Annotated[float, Field(ge=-100, le=100)], ...] = ()
    """Factors of the adapter's effect for a strip of pictures; none without one."""


def sample(source: Source, prompts: list[Prompt], settings: SampleSettings) -> SampleResult:
    """Make pictures. Without prompts, a run uses some of its evaluation prompts."""
    prompts = prompts or default_prompts(source)
    if settings.strengths and not source.adapters:
        raise UserError(
            "There is no adapter whose strength could change. Give a run or an adapter, or add one "
            "to the model: --adapter ADAPTER."
        )
    # First, because a model takes longer to load than a wrong name takes to answer.
    evaluator = make_evaluator(source, prompts, settings)
    with distributed.ending_together():
        policy = load_policy(source, settings)
        if settings.strengths:
            return _strip(policy, evaluator, source, settings)
        # The adapter is switched off, not removed: both rows come from one model in memory.
        before = evaluator.score(evaluator.sample(policy.at("reference")))
        if not source.adapters:
            return _result(before, prompts, settings)
        after = evaluator.score(evaluator.sample(policy.at("policy")))
    return replace(
        _result(after, prompts, settings),
        adapters=tuple(map(str, source.adapters)),
        before=_result(before, prompts, settings),
        difference=paired_difference(before, after),
    )


def _strip(
    policy: Policy, evaluator: Evaluator, source: Source, settings: SampleSettings
) -> SampleResult:
    """Return the pictures of the last strength, with those of all of them in its `strip`."""
    strip = {}
    for strength in settings.strengths:
        with policy.at_strength(strength):
            result = evaluator.score(evaluator.sample(policy.at("policy")))
        strip[strength] = _result(result, [*evaluator.prompts], settings)
    last = strip[settings.strengths[-1]]
    return replace(last, adapters=tuple(map(str, source.adapters)), strip=strip)


def evaluate(source: Source) -> EvaluationResult:
    """Evaluate a run as its training does, with its adapter if there is one.

    Raises UserError if the source has no configuration.
    """
    config = source.config
    if config is None:
        raise UserError("The source has no evaluation prompts. Give a run folder or a YAML file.")
    with distributed.ending_together():
        inputs = distributed.raise_everywhere(lambda: read_inputs(config))
        model = load_model(replace(config.model, adapter=""), str(distributed.device()))
        assembly = assemble(inputs, model)
        policy = assembly.state.policy
        if source.adapter:
            load_adapter(policy, source.adapter)
        weights = policy.at("policy" if source.adapter else "reference")
        return assembly.evaluator(weights.sampling(config.evaluation_sampler))


def describe_source(
    source: Source, prompts: list[Prompt], settings: SampleSettings
) -> dict[str, str]:
    """Return what will be sampled, by the name of the fact."""
    sampler = sampler_of(source, settings)
    guidance = getattr(sampler, guidance_key(source.model))
    prompts = prompts or default_prompts(source)
    strip = settings.strengths
    images = f"{plural(len(prompts), 'prompt')} x {plural(settings.images, 'image')}"
    return {
        "model": model_fact(source.model),
        **({"adapter": " + ".join(map(str, source.adapters))} if source.adapters else {}),
        **({"strengths": ", ".join(f"{s:g}" for s in strip)} if strip else {}),
        "sampling": f"{images}, {plural(sampler.steps, 'step')}, guidance {guidance:g}",
        "device": device_fact(distributed.count(), distributed.device()),
    }


def sampler_of(source: Source, settings: SampleSettings) -> Sampler:
    """Return the sampler of a source with the settings of the user."""
    key = guidance_key(source.model)
    changes = {
        "steps": settings.steps,
        key: settings.guidance,
        "negative_prompt": settings.negative_prompt,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    sampler = replace(source.sampler, **changes)
    if settings.negative_prompt and sampler.guidance == 1:
        reason = "guidance is 1. Give a guidance above 1, or leave out the negative prompt."
        if key != "guidance":
            reason = f"{source.model.name} models take guidance as an input. Leave it out."
        raise UserError(f"The negative prompt would have no effect, because {reason}")
    return sampler


def load_policy(source: Source, settings: SampleSettings) -> Policy:
    """Load the model and its adapters."""
    # A few pictures do not make up for the minutes that compiling takes. The adapter of a run holds
    # what it began with.
    config = replace(source.model, compile=False, adapter="")
    model = load_model(config, str(distributed.device()))
    sampler = sampler_of(source, settings)
    if source.mixed:
        return mixed_policy(model, sampler, source.adapters)
    policy = Policy(model, sampler)
    if source.adapter:
        load_adapter(policy, source.adapter)
    return policy


def make_evaluator(source: Source, prompts: list[Prompt], settings: SampleSettings) -> Evaluator:
    """Return an evaluator that makes the pictures of these prompts and scores them."""
    images_per_pass = source.config.train.images_per_pass if source.config else IMAGES_PER_PASS
    count = len(prompts) * settings.images
    return Evaluator(
        prompts=prompts,
        images_per_prompt=settings.images,
        scorer=make_scorer(settings.rewards, images_per_pass),
        images_per_pass=images_per_pass,
        seed=settings.seed,
        shown=count,
        pictured=0,
    )


def make_scorer(rewards: Sequence[str], images_per_pass: int) -> RolloutScorer:
    """Return what scores the pictures by the rewards that the user names.

    Those of a run are not loaded: its configuration may come from somebody else, and a reward is
    code, or the address of a server that the pictures are sent to.
    """
    # Nothing is combined or compared here, so the two rules are never called.
    combine, advantage = COMBINE["weighted_sum"](), ADVANTAGES["group"]
    loaded = load_specs(rewards)
    return RolloutScorer(loaded, combine, advantage, images_per_pass, distributed.device())


def output_folder(source: str, output: str | Path | None) -> Path:
    """Return where pictures are saved: the folder that a user named, or a new one.

    Raises UserError if pictures of an earlier call are in it.
    """
    return free_folder(Path(output).expanduser()) if output else default_folder(source)


def default_folder(source: str) -> Path:
    """Return a new folder for the pictures of a source: in its run folder, or in `outputs`."""
    folder = Path(locate(source))
    run = folder if (folder / "config.yaml").is_file() else enclosing_run(folder)
    return next_folder((run or Path("outputs")) / "samples")


def _result(
    result: EvaluationResult, prompts: list[Prompt], settings: SampleSettings
) -> SampleResult:
    numbers = [i // settings.images for i in range(len(prompts) * settings.images)]
    return SampleResult(
        images=result.images,
        prompts=[prompts[number].text for number in numbers],
        prompt_numbers=numbers,
        image_numbers=list(range(settings.images)) * len(prompts),
        seed=settings.seed,
        scores={name: values.tolist() for name, values in result.rewards.items()},
        means=result.means,
        difference={},
    )
