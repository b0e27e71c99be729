"""The end of a run: evaluate the trained weights, export them, and say where everything is."""

from flowalign import distributed
from flowalign.evaluation.results import EvaluationResult
from flowalign.evaluation.statistics import paired_difference
from flowalign.progress import say
from flowalign.reporting.console import print_differences
from flowalign.reporting.summary import Summary
from flowalign.runs.environment import peak_memory
from flowalign.runs.export import (
    ADAPTER,
    export_adapter,
    PICTURES,
    write_results,
    write_summary,
)
from flowalign.training.run import Run


def finish(run: Run, before: EvaluationResult, reason: str) -> Summary:
    """Evaluate and export the trained weights. An interrupted run only writes its summary.

    Args:
        run: A run after its loop.
        before: The evaluation of the model without adapter.
        reason: Why the loop ended.
    """
    summary = summarize(run, before, reason)
    if reason == "interrupted":
        if distributed.is_main():
            say(f"Stopped after step {run.progress.step}. The same command resumes from there.")
            write_summary(run.folder, summary)
        return summary
    step = run.exported_step()
    after = run.evaluate_step(step)
    summary["step"] = step
    summary["after"] = after.means
    summary["difference"] = paired_difference(before, after)
    if distributed.is_main():
        weights = run.exported_weights
        export_adapter(run.state.policy, run.folder / ADAPTER, weights, run.config)
        write_results(run.folder, summary, before, after, run.evaluator.captions(after))
        announce(run, summary)
    return summary


def summarize(run: Run, before: EvaluationResult, reason: str) -> Summary:
    """Return the summary of a run as long as nothing is exported."""
    return Summary(
        before=before.means,
        after={},
        difference={},
        images=run.progress.images,
        seconds=round(run.progress.seconds, 1),
        peak_memory_bytes=peak_memory(run.state.policy.model.device),
        stopped=reason,
        weights=run.exported_weights,
        step=run.progress.step,
    )


def announce(run: Run, summary: Summary) -> None:
    """Print the results and where they are."""
    if summary["stopped"] != "finished":
        say(f"Stopped after step {run.progress.step} by train.stop: {summary['stopped']}.")
    prompts = len(run.evaluator.prompts)
    print_differences(summary["before"], summary["after"], summary["difference"], prompts=prompts)
    for name, path in (("Pictures", PICTURES), ("Report", "report.html"), ("Adapter", ADAPTER)):
        say(f"{name + ':':10}{run.folder / path}")
