"""The model without adapter at its best guidance: what a user can have without any training.

Guidance alone can raise a score by more than training does, and a policy that samples without it
can learn to imitate it. So a run is compared with the model without adapter twice: at the guidance
of the run's evaluations, and at the guidance that suits this model best.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from uuid import uuid4

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save
from torch import Tensor

from flowalign import distributed
from flowalign.errors import RunError, UserError
from flowalign.evaluation.evaluator import Evaluator
from flowalign.evaluation.results import EvaluationResult
from flowalign.files import cache_folder, verify_checksums, write_checksums, write_folder
from flowalign.policy import Policy, Sampler
from flowalign.progress import say, task

FORMAT = "2"
"""Part of every key. Another value makes every kept baseline be measured again."""
CHOICE, RESULT = "choice.json", "result.safetensors"
"""The two files of a baseline."""


@dataclass(frozen=True, kw_only=True)
class GuidanceChoice:
    """Which guidance suits a model best, and how it was chosen."""

    key: str
    """Hash of everything that the choice and the evaluation under it depend on."""
    setting: str
    """The key of `sampler` that was varied: `guidance` or `embedded_guidance`."""
    own: float
    """The guidance of the run's evaluations."""
    best: float
    """The guidance that was chosen."""
    target: str
    """The reward that chose it."""
    prompts: int
    """The number of prompts that it was chosen on."""
    scores: dict[float, float]
    """The mean of the target at every guidance that was tried and scored."""


@dataclass(frozen=True, kw_only=True)
class GuidedBaseline:
    """An evaluation of the model without adapter at its best guidance."""

    choice: GuidanceChoice
    result: EvaluationResult

    def save(self, folder: Path) -> None:
        """Write the baseline into a folder, with checksums. An older one is replaced."""

        def write(unfinished: Path) -> None:
            (unfinished / CHOICE).write_bytes(_CHOICE.dump_json(self.choice, indent=2))
            self.result.save(unfinished / RESULT)
            write_checksums(unfinished)

        write_folder(folder, write)

    @classmethod
    def load(cls, folder: Path) -> "GuidedBaseline | None":
        """Return what `save` wrote, or None if it is missing or damaged.

        A damaged baseline is not an error, because it can be measured again.
        """
        try:
            verify_checksums(folder, [CHOICE, RESULT])
            choice = _CHOICE.validate_json((folder / CHOICE).read_bytes())
            result = EvaluationResult.load(folder / RESULT)
        except (UserError, ValidationError, OSError):
            return None
        return cls(choice=choice, result=result)


_CHOICE = TypeAdapter(GuidanceChoice)


@dataclass(frozen=True, kw_only=True)
class GuidanceSweep:
    """Finds the best guidance of a model without adapter. All ranks call each method together."""

    evaluator: Evaluator
    policy: Policy
    """The model without adapter, under the sampler of the run's evaluations."""
    before: EvaluationResult
    """Its evaluation under that sampler."""
    scales: Sequence[float]
    """The scales to try, besides that of the sampler."""
    target: str
    """The reward that chooses."""
    sign: int
    """1 if more of it is better, -1 if less is."""
    rewards: Sequence[str] = ()
    """Code and settings of the rewards, which may show in guided pictures alone."""

    @property
    def setting(self) -> str:
        """The key of the sampler that guides this model."""
        return self.policy.model.guidance_setting

    @property
    def own(self) -> float:
        """The guidance of the run's evaluations."""
        return float(getattr(self.policy.sampler, self.setting))

    @property
    def candidates(self) -> list[float]:
        """The scales to try; the run's own comes first, so that it wins a tie."""
        return list(dict.fromkeys([self.own, *sorted(map(float, self.scales))]))

    @cached_property
    def tuning(self) -> Evaluator:
        """The evaluator that chooses."""
        return self.evaluator.for_tuning(self.target)

    @property
    def key(self) -> str:
        """A hash of everything that the baseline depends on.

        The evaluation of the run's own baseline stands for model, text encoders, noise and weights
        of rewards. Any change of them changes some of its pictures or scores. A reward's code and
        settings are named beside it: a limit may hold for guided pictures alone.
        """
        sampler, evaluator, before = self.policy.sampler, self.evaluator, self.before
        facts = {
            "format": FORMAT,
            "sampler": [sampler.steps, sampler.guidance, sampler.embedded_guidance],
            "negative_prompt": sampler.negative_prompt,
            "candidates": [self.setting, *self.candidates],
            "target": [self.target, self.sign],
            "rewards": list(self.rewards),
            "prompts": [[prompt.text, prompt.metadata] for prompt in evaluator.prompts],
            "images": [evaluator.images_per_prompt, evaluator.seed],
            "tuning": [len(self.tuning.prompts), self.tuning.images_per_prompt],
        }
        tensors = {"prompt": before.prompt, "images": before.images, "shown": before.shown}
        tensors |= {f"reward/{name}": values for name, values in before.rewards.items()}
        tensors["formula"] = self._formula()
        content = save({name: values.contiguous() for name, values in tensors.items()})
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
        digest.update(content)
        return digest.hexdigest()

    def _formula(self) -> Tensor:
        """Return what the guidance formula of the family gives for fixed velocities."""
        # The run's own baseline may be unguided, and then it does not show the formula.
        model = self.policy.model
        ramp = torch.linspace(-1, 1, torch.Size(model.latent_shape).numel(), device=model.device)
        v = ramp.view(1, *model.latent_shape)
        rows = torch.cat([model.guide(v, v.square(), scale) for scale in self.candidates])
        # Devices round differently, and a run may be resumed on another one.
        return rows.cpu().round(decimals=3)

    def __call__(self, folder: Path) -> GuidedBaseline:
        """Return the baseline that a folder holds, or that an earlier run measured, or a new one.

        Args:
            folder: Where this run keeps it, so that a resumed run compares with the same numbers.

        Raises:
            RunError: A reward failed on a guided image.
        """
        # Only the main process looks for it: others may see files later, or round differently.
        key = distributed.from_main(lambda: self.key)
        if not distributed.from_main(lambda: _recall(folder, key)):
            baseline = self._measure_or_explain(key)
            if distributed.is_main():
                baseline.save(folder)
                _remember(baseline)
        baseline = distributed.from_main(lambda: _load(folder, key))
        assert baseline is not None
        return baseline

    def _measure_or_explain(self, key: str) -> GuidedBaseline:
        try:
            return self.measure(key)
        except RunError as error:
            raise RunError(
                "The model without adapter could not be evaluated under guidance. "
                f"evaluation.guidance_sweep=[] leaves this comparison out. {error}"
            ) from error

    def measure(self, key: str) -> GuidedBaseline:
        """Choose the guidance on the tuning images, and evaluate the model at it."""
        scores = self.scores()
        best = max(scores, key=lambda scale: self.sign * scores[scale], default=self.own)
        choice = GuidanceChoice(
            key=key,
            setting=self.setting,
            own=self.own,
            best=best,
            target=self.target,
            prompts=len(self.tuning.prompts),
            scores=scores,
        )
        result = self.before if best == self.own else self.evaluate_at(best, self.evaluator)
        return GuidedBaseline(choice=choice, result=result)

    def scores(self) -> dict[float, float]:
        """Return the mean of the target at every scale, without those that have no score."""
        scores = {}
        with task("choosing the guidance of the base", total=len(self.candidates)) as work:
            for scale in self.candidates:
                scores[scale] = self.evaluate_at(scale, self.tuning).means[self.target]
                work.advance()
        # NaN, the mean of no score, differs from itself.
        return {scale: score for scale, score in scores.items() if score == score}

    def evaluate_at(self, scale: float, evaluator: Evaluator) -> EvaluationResult:
        """Score the model at one guidance, in passes that need no more memory than the run's."""
        own = self.policy.sampler
        sampler = replace(own, **{self.setting: scale})
        images = evaluator.images_per_pass * _rows_per_image(own) // _rows_per_image(sampler)
        evaluator = replace(evaluator, images_per_pass=max(1, images))
        return evaluator.score(evaluator.sample(self.policy.sampling(sampler)))


def _rows_per_image(sampler: Sampler) -> int:
    """Return how many rows of a forward an image takes: two with classifier-free guidance."""
    return 1 if sampler.guidance == 1 else 2


def _recall(folder: Path, key: str) -> bool:
    """Return True if the folder holds the baseline, or now holds what an earlier run kept."""
    if _load(folder, key):
        return True
    with suppress(UserError):  # There is no folder for caches, so nothing was kept.
        kept = _load(_kept(key), key)
        if kept:
            kept.save(folder)
            return True
    return False


def _load(folder: Path, key: str) -> GuidedBaseline | None:
    """Return the baseline of a folder, or None if it has none with this key."""
    baseline = GuidedBaseline.load(folder)
    return baseline if baseline and baseline.choice.key == key else None


def _remember(baseline: GuidedBaseline) -> None:
    """Keep a baseline for later runs, if the cache can be written."""
    try:
        kept = _kept(baseline.choice.key)
        # A name of its own: two runs may measure the same baseline at the same time.
        own = kept.with_name(f"{kept.name}.{uuid4().hex}")
        baseline.save(own)
        # What is there was found missing or damaged. If another run fills it now, its copy stays.
        shutil.rmtree(kept, ignore_errors=True)
        with suppress(OSError):
            own.rename(kept)
        shutil.rmtree(own, ignore_errors=True)
    except (OSError, UserError) as error:
        say(f"Note: the guided baseline is not kept for other runs: {error}")


def _kept(key: str) -> Path:
    """Return where a baseline is kept. Raises UserError if there is no folder for caches."""
    return cache_folder() / "guidance" / key
