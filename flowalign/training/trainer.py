"""The training loop: a batch, its updates, the evaluation, the log, the checkpoint."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from flowalign import distributed
from flowalign.config.sections import Config
from flowalign.progress import task
from flowalign.reporting.summary import Summary
from flowalign.reporting.trackers import Trackers
from flowalign.runs.advice import advise_on_out_of_memory, keep_finished_steps
from flowalign.runs.interrupt import TERMINATED
from flowalign.training.finish import finish, report_progress
from flowalign.training.run import prepare, Run
from flowalign.training.update import update, update_snapshots


def train(config: Config) -> Summary:
    """Train a configuration from its last checkpoint, or from the start, to its end.

    Works in any thread, and several times in one process.

    Args:
        config: What `load_config` returned.

    Returns:
        The content of `summary.json`: means of base and trained model, and what training adds.

    Raises:
        UserError: The configuration cannot work.
        RunError: The run failed. The message says where its finished steps are.
        SystemExit: SIGTERM stopped the run after a step, which is saved.
    """
    with distributed.ending_together():
        with advise_on_out_of_memory(config):
            run = prepare(config)
        summary = execute(run)
        terminated = summary["stopped"] == "interrupted" and distributed.any_rank(
            run.interrupt.terminated
        )
    # SIGTERM asked the whole process to end, so whatever called this function ends too. No rank has
    # failed, so this stands outside the block.
    if terminated:
        raise SystemExit(TERMINATED)
    return summary


def execute(run: Run) -> Summary:
    """Evaluate, train, evaluate again and export a run that `prepare` returned."""
    with run.lock:
        # A signal must not end the process while it saves, either: when one process is killed,
        # launchers send SIGTERM to the others within a tenth of a second.
        with run.interrupt.listening(), finished_steps_kept(run):
            before = run.evaluate_reference()
            report_progress(run)
            reason = fit(run)
        # Ctrl-C in the export stops at once, which loses nothing: the last step is saved, and the
        # same command exports it.
        with finished_steps_kept(run):
            return finish(run, before, reason)


@contextmanager
def finished_steps_kept(run: Run) -> Iterator[None]:
    """Save the finished steps if the block fails, and say where they are and what to do."""
    with (
        keep_finished_steps(run.folder, run.save_finished_steps),
        advise_on_out_of_memory(run.config),
    ):
        yield


def fit(run: Run) -> str:
    """Train until the last step, a rule of `train.stop`, or a signal. Returns which of these."""
    train, progress = run.config.train, run.progress
    with run.open_trackers() as trackers, task("training", train.steps, progress.step) as bar:
        # A run whose last evaluation failed begins with that evaluation.
        if run.evaluation_due:
            record(run, trackers, progress.totals)
        while not (reason := run.stop_reason()):
            metrics = take_step(run)
            # Recorded first, so that the steps that led to the failure can be seen.
            record(run, trackers, metrics)
            run.raise_if_stuck()
            bar.advance(note=describe(metrics))
            if run.needs_checkpoint():
                run.save()
    # A run that stops early must be resumable from here.
    if 0 < progress.step < train.steps:
        run.save()
    return reason


def take_step(run: Run) -> dict[str, float]:
    """Make a batch and update the policy with it. Returns what to log.

    The batch is freed at the end, so that an evaluation has its memory.
    """
    config, train, progress = run.config, run.config.train, run.progress
    began = time.monotonic()
    batch, metrics = run.next_batch()
    result = update(run.state, config.objective, batch, train, run.skip_update)
    # Copies follow after every step, also after one whose updates were skipped.
    scheduled = (progress.step + 1) * train.updates_per_step
    update_snapshots(run.state.policy, config.objective, scheduled, after="step")
    seconds = time.monotonic() - began
    progress.advance(result.outcomes, result.has_gradient, run.generated_per_step, seconds)
    speed = {"images_per_second": run.plan.images_per_step / seconds}
    logged = run.state.scorer.take_logged()
    return {**progress.totals, **result.metrics, **speed, **metrics, **logged}


def record(run: Run, trackers: Trackers, metrics: dict[str, float]) -> None:
    """Log a step, and its evaluation if one is due, which the report then shows."""
    step, is_due = run.progress.step, run.evaluation_due
    try:
        if is_due:
            result = run.evaluate()
            trackers.images(step, "pictures", result.images, run.evaluator.captions(result))
            metrics = {**metrics, **result.metrics, **run.selection_scores(result)}
            run.progress.evaluations.append(metrics)
    finally:
        # The step is logged even if its evaluation fails: the run resumes after it.
        trackers.log(step, metrics)
    if is_due:
        report_progress(run)


def describe(metrics: dict[str, float]) -> str:
    """Return the few numbers that stand beside the progress bar."""
    name = "reward/combined" if "reward/combined" in metrics else "loss"
    value, speed = metrics[name], metrics["images_per_second"]
    return f"{name.partition('/')[0]} {value:.3g}, {speed:.3g} images/s"
