"""A run: its folder, its progress, and the decisions of the training loop that depend on them."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from flowalign import distributed
from flowalign.batch import Batch
from flowalign.config.resolved import resolve
from flowalign.config.sections import Config
from flowalign.errors import RunError, UserError
from flowalign.evaluation.early_stopping import best_step, stop_reason, within_limits
from flowalign.evaluation.evaluator import Evaluator
from flowalign.evaluation.guidance import GuidanceSweep, GuidedBaseline
from flowalign.evaluation.halves import Halves, split_prompts
from flowalign.evaluation.results import EvaluationResult
from flowalign.evaluation.statistics import paired_difference
from flowalign.policy import Policy
from flowalign.progress import say
from flowalign.reporting.summary import BetterStep
from flowalign.reporting.trackers import open_trackers, Trackers
from flowalign.rewards.registry import reward_identities
from flowalign.rollouts.batch_plan import BatchPlan
from flowalign.rollouts.scoring import NotFinite
from flowalign.rollouts.sources import Source
from flowalign.runs.checkpoint import (
    checkpoint_folder,
    load_checkpoint,
    Progress,
    save_checkpoint,
    TrainState,
)
from flowalign.runs.failures import FAILURES, SkippedUpdate, write_failure
from flowalign.runs.folder import (
    BEFORE,
    evaluation_file,
    GUIDED,
    open_folder,
    write_prompts,
)
from flowalign.runs.interrupt import Interrupt
from flowalign.runs.lock import FolderLock
from flowalign.tracking.base import Tracker
from flowalign.tracking.registry import load_trackers
from flowalign.training.preflight import require_preflight
from flowalign.training.setup import assemble, load, read_inputs

IDLE_STEPS = 10
"""Steps in a row with a gradient of exactly 0 after which a run says so."""
EVALUATION, SELECTION = "eval/", "selection/"
"""How the names of metrics begin: on all evaluation prompts, and on those that choose a step."""


@dataclass(kw_only=True)
class Run:
    """A run folder and everything that trains in it."""

    config: Config
    state: TrainState
    """The weights, the optimizer and the learned rewards."""
    source: Source
    """Makes the batch of a step."""
    evaluator: Evaluator
    """Scores fixed prompts under any weights."""
    plan: BatchPlan
    """The batch arithmetic of a step."""
    folder: Path
    """The run folder, `output` in the configuration."""
    lock: FolderLock
    """Keeps other runs out of the folder until this one ends."""
    progress: Progress
    """How far the run has come."""
    interrupt: Interrupt = field(default_factory=Interrupt)
    """The request to stop after the present step."""
    trackers: dict[str, Tracker] = field(default_factory=dict)
    """The trackers of the section `tracking`; only the main process has any."""
    rewards_before: tuple[int, dict[str, Tensor]] = (-1, {})
    """The step that began last, and the state of the rewards at that time."""
    last_evaluation: tuple[int, EvaluationResult] | None = None
    """The step and the result of the last evaluation of the trained weights."""

    @property
    def exported_weights(self) -> str:
        """The weights that are evaluated and exported: the moving average if there is one."""
        return "ema" if self.config.train.ema.decay else "policy"

    @property
    def generated_per_step(self) -> int:
        """Images that a step generates: none if it learns from given pictures."""
        return 0 if self.config.data.pairs else self.plan.images_per_step

    @property
    def is_mid_update(self) -> bool:
        """True between the first update of a step and the end of the step.

        A checkpoint taken then could not be resumed exactly, because the step would be repeated
        from weights that it has already changed.
        """
        return self.state.updates != self.progress.updates

    @property
    def evaluation_due(self) -> bool:
        """True if the present step is to be evaluated and has not been."""
        step, train = self.progress.step, self.config.train
        is_scheduled = step > 0 and bool(train.evaluate_every) and step % train.evaluate_every == 0
        return (is_scheduled or step == train.steps) and not self.progress.is_evaluated

    def needs_checkpoint(self) -> bool:
        """Return True if the present step is to be saved: by schedule, as the last, or as the best.

        All ranks call this together.
        """
        step, train = self.progress.step, self.config.train
        if step % train.save_every == 0 or step == train.steps:
            return True
        return self.progress.is_evaluated and distributed.from_main(self.find_best_step) == step

    def stop_reason(self) -> str:
        """Return why training ends now, or an empty string. All ranks call this together.

        The reason is "finished", "interrupted", or the rule of `train.stop` that holds.
        """
        if self.progress.step >= self.config.train.steps:
            return "finished"
        rule = stop_reason(self.config.train.stop, self.progress.evaluations)
        if rule:
            return rule
        # A signal may reach one rank before another, and all must leave the loop at the same step.
        return "interrupted" if distributed.any_rank(self.interrupt.requested) else ""

    def next_batch(self) -> tuple[Batch, dict[str, float]]:
        """Make the batch of the next step. Returns it with its metrics.

        If a reward was infinite, the batch is empty, and the step counts as a skipped update.
        """
        rewards = {name: value.clone() for name, value in self.state.scorer.state().items()}
        self.rewards_before = self.progress.step, rewards
        try:
            return self.source(self.progress.step)
        except NotFinite as error:
            self.skip_update(SkippedUpdate(error.rollout, 0, str(error)))
            self.progress.count_update(applied=False)
            # The loop goes on, so that one bad batch costs one step and not the run.
            return error.rollout[[]], {}  # no rows

    def skip_update(self, skipped: SkippedUpdate) -> None:
        """Dump an update that is not applied, and say where the dump is."""
        # Earlier updates of the same step are in the weights, so the dump must count them.
        progress = replace(self.progress, updates=self.state.updates)
        keep = self.config.train.max_bad_steps
        folder = write_failure(self.folder, self.state, progress, skipped, keep)
        if distributed.is_main():
            step = self.progress.step + 1
            say(f"Step {step} was not applied: {skipped.reason}. Its batch is in {folder}.")

    def raise_if_stuck(self) -> None:
        """Raise RunError after too many skipped updates, or steps without a gradient, in a row."""
        self._raise_if_not_finite()
        self._raise_if_idle()

    def _raise_if_not_finite(self) -> None:
        skipped = self.progress.bad_steps
        if skipped >= self.config.train.max_bad_steps:
            raise RunError(
                f"{skipped} updates in a row were not finite (train.max_bad_steps) and were not "
                f"applied; they are in {self.folder / FAILURES}. If a reward produced the value, "
                "fix the reward. Otherwise try a lower train.learning_rate, or "
                "model.dtype: float32 in a new output folder."
            )

    def _raise_if_idle(self) -> None:
        idle, more = self.progress.idle_steps, self.config.train.max_bad_steps
        advice = (
            "Give the images of a prompt different rewards (`reward/spread_in_group`), weights of "
            "`rewards` nearer to 1, or a lower train.learning_rate in a new output folder. "
            f"{self.state.scorer.combine.advice_if_equal}"
        ).rstrip()
        if idle >= IDLE_STEPS + more:
            raise RunError(
                f"The gradient was exactly 0 in {idle} steps in a row, the last {more} of them "
                f"since the warning (train.max_bad_steps). {advice}"
            )
        if idle == IDLE_STEPS and distributed.is_main():
            say(
                f"The gradient was exactly 0 in {idle} steps in a row: nothing is learned. After "
                f"{more} more such steps the run stops (train.max_bad_steps). {advice}"
            )

    def evaluate(self) -> EvaluationResult:
        """Evaluate the trained weights as they are, once per step. All ranks call this together."""
        if self.last_evaluation is None or self.last_evaluation[0] != self.progress.step:
            result = self.evaluator(self.evaluation_view(self.exported_weights))
            self.last_evaluation = self.progress.step, result
            if distributed.is_main():
                result.without_pictures.save(evaluation_file(self.folder, self.progress.step))
        return self.last_evaluation[1]

    def evaluate_reference(self) -> EvaluationResult:
        """Evaluate the model without adapter, once per run. All ranks call this together."""
        file = self.folder / BEFORE
        if distributed.is_main():
            write_prompts(self.folder, self.evaluator.prompts)
        if not distributed.from_main(file.exists):
            result = self.evaluator(self.evaluation_view("reference"))
            if distributed.is_main():
                result.save(file)
        # Read back, so that a resumed run compares with exactly the same numbers.
        return distributed.from_main(lambda: EvaluationResult.load(file))

    def evaluate_guided(self, before: EvaluationResult) -> GuidedBaseline | None:
        """Evaluate the model without adapter at its best guidance, once per run.

        All ranks call this together. Returns None if `evaluation.guidance_sweep` is empty, or if no
        reward is evaluated.

        Args:
            before: What `evaluate_reference` returned, with the scores of all prompts.
        """
        scales, target = self.config.evaluation.guidance_sweep, self.config.target_reward
        if not scales or target is None:
            return None
        name, sign = target
        find = GuidanceSweep(
            evaluator=self.evaluator,
            policy=self.evaluator.on_its_model(self.evaluation_view("reference")),
            before=before,
            scales=scales,
            target=name,
            sign=sign,
            rewards=reward_identities(self.config.evaluation.rewards),
        )
        return find(self.folder / GUIDED)

    def evaluate_step(self, step: int) -> EvaluationResult:
        """Evaluate the weights of a saved step, and leave them in place."""
        if step == self.progress.step:
            return self.evaluate()
        load_checkpoint(self.state, checkpoint_folder(self.folder, step))
        return self.evaluator(self.evaluation_view(self.exported_weights))

    def evaluation_view(self, weights: str) -> Policy:
        """Return the policy under some weights and the evaluation's sampler."""
        return self.state.policy.at(weights).sampling(self.config.evaluation_sampler)

    def find_best_step(self) -> int | None:
        """Return the step with the best evaluation of those whose weights still exist.

        Evaluations beyond the limits of `train.stop` do not count. Looks into the run folder, where
        the ranks may see different files.
        """
        # The present step may not be saved yet, but it will be if it is the best.
        present = [
            entry
            for entry in self.progress.evaluations
            if entry["step"] == self.progress.step
            or checkpoint_folder(self.folder, int(entry["step"])).is_dir()
        ]
        name, sign = self.config.selection_metric
        halved = name.replace(EVALUATION, SELECTION, 1)
        # Metrics of training, and of velocities and diversity, have no halves.
        chosen_by = halved if any(halved in entry for entry in present) else name
        return best_step(chosen_by, sign, within_limits(self.config.train.stop, present))

    def exported_step(self) -> int:
        """Return the step whose weights are exported: the last one, or the best one.

        All ranks call this together.
        """
        best = None
        if self.config.train.exports_best:
            best = distributed.from_main(self.find_best_step)
        return self.progress.step if best is None else best

    @cached_property
    def halves(self) -> Halves:
        """The evaluation prompts that choose a step, and those that measure what was chosen."""
        return split_prompts([prompt.text for prompt in self.evaluator.prompts])

    def selection_scores(self, result: EvaluationResult) -> dict[str, float]:
        """Return the means of an evaluation over the half of the prompts that chooses a step.

        They are logged as `selection/NAME`. All are logged, because another one may rank the
        evaluations when the run is resumed.
        """
        means = self.halves.choose(result).means
        return {f"{SELECTION}{name}": mean for name, mean in means.items()}

    def reported(self, result: EvaluationResult) -> EvaluationResult:
        """Return a result with the scores that the summary may show.

        They are those of the prompts that did not choose the exported step.
        """
        return self.halves.measure(result) if self.config.train.exports_best else result

    def better_step(self, exported: int) -> BetterStep | None:
        """Return a saved step that was clearly better than the exported one, or None.

        The step is chosen on one half of the prompts. It is clearly better if the 95 % interval of
        the difference is above zero on the other half.
        """
        best = self.find_best_step()
        if best is None or best == exported:
            return None
        file = evaluation_file(self.folder, best)
        metric, sign = self.config.selection_metric
        name = metric.removeprefix(EVALUATION)
        if self.last_evaluation is None:
            return None
        try:
            earlier = self.halves.measure(EvaluationResult.load(file))
        except UserError:
            # The files of single steps are not part of a checkpoint. A removed or damaged one
            # costs this note, and not the export.
            return None
        change = paired_difference(earlier, self.halves.measure(self.last_evaluation[1])).get(name)
        if change is None or max(sign * end for end in change) >= 0:
            return None
        return {"step": best, "metric": name, "change": change}

    def save(self) -> None:
        """Save a checkpoint of the present step. All ranks call this together."""
        if distributed.is_main():
            self._save_checkpoint()
        distributed.barrier()

    def save_finished_steps(self) -> None:
        """Save the steps that are finished when a run fails, perhaps on this rank alone."""
        if not distributed.is_main() or not self.progress.step or self.is_mid_update:
            return
        step, rewards = self.rewards_before
        if step == self.progress.step:
            # Learned rewards, and statistics of them, have seen images that will be made again.
            self.state.scorer.load_state(rewards)
        self._save_checkpoint()

    def _save_checkpoint(self) -> None:
        keep, best = self.config.train.keep, self.find_best_step()
        save_checkpoint(self.state, self.progress, self.folder, keep, best)

    def open_trackers(self) -> Trackers:
        """Open the trackers of the run; only the main process has any."""
        if not distributed.is_main():
            return Trackers()
        return open_trackers(self.folder, self.progress.step, resolve(self.config), self.trackers)


def prepare(config: Config) -> Run:
    """Check a configuration, load its model, and create or resume its run folder.

    Raises:
        UserError: Something cannot work. The message says what to write instead.
    """
    # Everything that costs little is checked first: the model may take minutes to load.
    trackers = distributed.raise_everywhere(
        lambda: load_trackers(config.tracking if distributed.is_main() else {})
    )
    inputs = distributed.raise_everywhere(lambda: read_inputs(config))
    assembly = assemble(inputs, load(config))
    require_preflight(assembly)
    folder = Path(config.output)
    lock, progress = open_folder(folder, config, assembly.state)
    return Run(
        config=config,
        state=assembly.state,
        source=assembly.source,
        evaluator=assembly.evaluator,
        plan=inputs.plan,
        folder=folder,
        lock=lock,
        progress=progress,
        trackers=trackers,
    )
