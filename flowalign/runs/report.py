"""Read what a page shows of a run from its folder, also while the run trains or after a crash.

No model and no reward is loaded, and no code that a configuration names is run.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from flowalign.config.changes import Changes
from flowalign.data.prompts import Prompt, read_prompts
from flowalign.errors import UserError
from flowalign.evaluation.guidance import GuidedBaseline
from flowalign.evaluation.halves import split_prompts
from flowalign.evaluation.results import EvaluationResult
from flowalign.evaluation.statistics import paired_difference
from flowalign.reporting import html
from flowalign.reporting.record import RunRecord, Snippet
from flowalign.reporting.summary import Summary
from flowalign.reporting.trackers import read_metrics
from flowalign.runs.adapter import ADAPTER_FILE
from flowalign.runs.adapter_card import CARD
from flowalign.runs.folder import AFTER, BEFORE, evaluation_file, GUIDED, PROMPTS, read_config

ADAPTER = "adapter"
"""Name of the exported adapter's folder in a run folder."""
GALLERY_STEPS = 8
"""The most evaluations on the way whose pictures a page shows."""


def write_report(run: Path, summary: Summary, target: tuple[str, int] | None = None) -> None:
    """Write `report.html` from the files of a run folder.

    Args:
        run: The run folder. Files that it lacks, or that are damaged, are left out.
        summary: The content of `summary.json`, or of a run that is not finished. If it has no
            figures after training, those of the last evaluation are shown.
        target: The score that the run is about, and 1 if more of it is better or -1 if less is.
    """
    record = read_record(run)
    if not summary["after"]:
        summary = _with_last_evaluation(summary, record)
    html.write_report(run, record, summary, target)


def read_record(run: Path, name: str = "") -> RunRecord:
    """Return what a page shows of a run. `name` is that of the folder by default."""
    config, metrics = _config(run), read_metrics(run)
    prompts = _prompts(run)
    before, after = _result(run / BEFORE), _result(run / AFTER)
    guided = guided_baseline(run, before) if before else None
    evaluated = [int(entry["step"]) for entry in metrics if _is_evaluated(entry)]
    if after is None and evaluated:
        after = _result(evaluation_file(run, evaluated[-1]))
    return RunRecord(
        name=name or run.absolute().name,
        objective=str(_section(config, "objective").get("name", "")),
        model=_models(config),
        config=_text(run / "config.yaml"),
        environment=_text(run / "environment.json"),
        changes=Changes.load(run),
        metrics=metrics,
        metrics_before=_metrics_before(before, prompts, metrics),
        prompts=prompts,
        before=before,
        guided=guided.result if guided else None,
        after=after,
        steps=_steps(run, evaluated),
        snippets=_snippets(run),
    )


def _models(config: Mapping[str, Any]) -> str:
    """Return the model that trains, and the one that makes the pictures if it is another."""
    trained = str(_section(config, "model").get("path", ""))
    evaluated = _section(config, "evaluation").get("model")
    return f"{trained}, evaluated on {evaluated}" if evaluated else trained


def _with_last_evaluation(summary: Summary, record: RunRecord) -> Summary:
    """Return a summary with the figures of the evaluations that a run has made so far."""
    before, after = record.before, record.after
    if before is None:
        return summary
    if summary["chosen_by"] and record.prompts:
        # The exported step is chosen on the other half.
        halves = split_prompts([prompt.text for prompt in record.prompts])
        before, after = halves.measure(before), halves.measure(after) if after else None
    filled = summary.copy()
    filled["before"] = before.means
    filled["prompts"], filled["held_out"] = before.scored_prompts, before.scored_entries
    if after is not None and after.prompt.equal(before.prompt):
        steps = [int(entry["step"]) for entry in record.metrics if _is_evaluated(entry)]
        filled["after"], filled["step"] = after.means, max(steps, default=0)
        filled["difference"] = paired_difference(before, after)
    return filled


def _is_evaluated(entry: Mapping[str, object]) -> bool:
    return any(name.startswith("eval/") for name in entry)


def _metrics_before(
    before: EvaluationResult | None,
    prompts: Sequence[Prompt],
    metrics: Sequence[Mapping[str, float]],
) -> dict[str, float]:
    """Return the metrics of the evaluation before training, by the names that are logged."""
    if before is None:
        return {}
    values = dict(before.metrics)
    if prompts and len(prompts) > int(before.prompt.max()):
        half = split_prompts([prompt.text for prompt in prompts]).choose(before)
        values |= {f"selection/{name}": mean for name, mean in half.means.items()}
    # Steps of older versions have no such metrics.
    logged = {name for entry in metrics for name in entry}
    return {name: value for name, value in values.items() if name in logged or not metrics}


def guided_baseline(run: Path, before: EvaluationResult) -> GuidedBaseline | None:
    """Return the guided model that a run compared with, or None if that is the model itself."""
    guided = GuidedBaseline.load(run / GUIDED)
    if guided is None or guided.choice.best == guided.choice.own:
        return None
    return guided if guided.result.prompt.equal(before.prompt) else None


def _steps(run: Path, evaluated: Sequence[int]) -> dict[int, EvaluationResult]:
    """Return evaluations with thumbnails, spread over training, with the last one."""
    count = min(GALLERY_STEPS, len(evaluated))
    chosen = [evaluated[(place + 1) * len(evaluated) // count - 1] for place in range(count)]
    results = {step: _result(evaluation_file(run, step)) for step in chosen}
    return {step: result for step, result in results.items() if result and result.thumbnails}


def _result(file: Path) -> EvaluationResult | None:
    with suppress(UserError):
        return EvaluationResult.load(file)
    return None


def _prompts(run: Path) -> list[Prompt]:
    with suppress(UserError):
        return read_prompts(run / PROMPTS) if (run / PROMPTS).is_file() else []
    return []


def _config(run: Path) -> dict[str, Any]:
    with suppress(UserError):
        return read_config(run)
    return {}


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = config.get(key)
    return section if isinstance(section, dict) else {}


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _snippets(run: Path) -> list[Snippet]:
    """Return how to load the exported adapter; nothing before it is exported."""
    adapter = run / ADAPTER
    if not (adapter / ADAPTER_FILE).is_file():
        return []
    blocks = re.findall(r"^```python\n(.*?)^```", _text(adapter / CARD), re.DOTALL | re.MULTILINE)
    file = shlex.quote(str(adapter / ADAPTER_FILE))
    target = shlex.quote(f"ComfyUI/models/loras/{run.absolute().name}.safetensors")
    return [
        *(Snippet("diffusers", block.rstrip("\n")) for block in blocks),
        Snippet(
            "ComfyUI: copy the file, then add the node LoraLoaderModelOnly at strength 1",
            f"cp {file} {target}",
        ),
        Snippet(
            "More pictures with and without the adapter",
            f'python sample.py {shlex.quote(str(run))} "a prompt" --images 4',
        ),
    ]
