"""The end of a run: evaluate the trained weights, export them, and say where everything is."""

from dataclasses import replace

from torch import Tensor

from flowalign import distributed
from flowalign.evaluation.guidance import GuidedBaseline
from flowalign.evaluation.results import EvaluationResult
from flowalign.evaluation.statistics import paired_difference
from flowalign.progress import say
from flowalign.reporting.console import print_differences
from flowalign.reporting.html import RUNNING
from flowalign.reporting.summary import (
    baselines,
    guidance_note,
    GuidedSummary,
    result_notes,
    Summary,
)
from flowalign.runs.checkpoint import find_checkpoint
from flowalign.runs.environment import peak_memory
from flowalign.runs.export import export_adapter, PICTURES, write_results, write_summary
from flowalign.runs.folder import AFTER
from flowalign.runs.report import ADAPTER, write_report
from flowalign.training.run import Run


def finish(run: Run, before: EvaluationResult, reason: str) -> Summary:
    """Evaluate and export the trained weights. An interrupted run only writes its summary.

    Args:
        run: A run after its loop.
        before: The evaluation of the model without adapter.
        reason: Why the loop ended.
    """
    summary = summarize(run, run.reported(before), reason)
    if reason == "interrupted":
        if distributed.is_main():
            say(f"Stopped after step {run.progress.step}. The same command resumes from there.")
            write_summary(run.folder, summary)
            write_report(run.folder, summary, run.config.target_reward)
        return summary
    step = run.exported_step()
    after = run.reported(run.evaluate_step(step))
    # Only now: an interrupted run does not wait for it, and training begins sooner.
    guided = run.evaluate_guided(before)
    if guided:
        guided = replace(guided, result=run.reported(guided.result))
    before = run.reported(before)
    summary["step"] = step
    summary["after"] = after.means
    summary["difference"] = paired_difference(before, after)
    summary["baseline_guided"] = summarize_guided(guided, after) if guided else None
    summary["better_step"] = distributed.from_main(lambda: run.better_step(step))
    if distributed.is_main():
        after.save(run.folder / AFTER)
        checkpoint = find_checkpoint(run.folder, step)
        export_adapter(checkpoint, run.folder / ADAPTER, run.config, summary)
        rows, captions = sheet_rows(before, guided, after), run.evaluator.captions(after)
        write_results(run.folder, summary, rows, captions)
        write_report(run.folder, summary, run.config.target_reward)
        announce(run, summary)
    return summary


def report_progress(run: Run) -> None:
    """Write the report of a run that trains, if this is the main process."""
    if distributed.is_main():
        # The figures come from the files of the run folder.
        summary = summarize(run, None, RUNNING)
        write_report(run.folder, summary, run.config.target_reward)


def summarize(run: Run, before: EvaluationResult | None, reason: str) -> Summary:
    """Return the summary of a run as long as nothing is exported."""
    return Summary(
        before=before.means if before else {},
        after={},
        difference={},
        baseline_guided=None,
        prompts=before.scored_prompts if before else 0,
        held_out=before.scored_entries if before else 0,
        images=run.progress.images,
        seconds=round(run.progress.seconds, 1),
        peak_memory_bytes=peak_memory(run.state.policy.model.device),
        stopped=reason,
        weights=run.exported_weights,
        step=run.progress.step,
        chosen_by=run.config.selection_metric[0] if run.config.train.exports_best else "",
        better_step=None,
    )


def summarize_guided(guided: GuidedBaseline, after: EvaluationResult) -> GuidedSummary:
    """Return what the summary says about the guided base and the evaluation after training."""
    choice = guided.choice
    return GuidedSummary(
        guidance=choice.best,
        own_guidance=choice.own,
        setting=choice.setting,
        chosen_by=choice.target,
        chosen_on=choice.prompts,
        sweep={f"{scale:g}": score for scale, score in choice.scores.items()},
        means=guided.result.means,
        difference=paired_difference(guided.result, after),
    )


def sheet_rows(
    before: EvaluationResult, guided: GuidedBaseline | None, after: EvaluationResult
) -> dict[str, Tensor]:
    """Return the pictures of the sheet by the label of their row."""
    rows = {"base": before.images}
    if guided and guided.choice.best != guided.choice.own:
        rows["guided"] = guided.result.images
    return {**rows, "trained": after.images}


def announce(run: Run, summary: Summary) -> None:
    """Print the results and where they are."""
    if summary["stopped"] != "finished":
        say(f"Stopped after step {run.progress.step} by train.stop: {summary['stopped']}.")
    print_differences(summary["after"], baselines(summary), summary["prompts"], summary["held_out"])
    if summary["baseline_guided"]:
        say(guidance_note(summary["baseline_guided"]))
    for note in result_notes(run.folder, summary):
        say(note)
    for name, path in (("Pictures", PICTURES), ("Report", "report.html"), ("Adapter", ADAPTER)):
        say(f"{name + ':':10}{run.folder / path}")
