"""Read finished runs from their files, and refuse to compare evaluations that do not match.

No model and no reward is loaded, and no code that a configuration names is run.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flowalign.config.resolved import differing
from flowalign.errors import UserError
from flowalign.evaluation.comparison import compare_results, Comparison
from flowalign.evaluation.results import EvaluationResult
from flowalign.reporting.comparison_page import write_comparison
from flowalign.rewards.registry import checked_rewards, reward_entry
from flowalign.runs.checkpoint import checkpoints, PROGRESS_FILE, read_progress
from flowalign.runs.folder import AFTER, BEFORE, read_config
from flowalign.runs.report import guided_baseline, read_record
from flowalign.settings.merging import Section

OWN_SETTINGS = (
    "lora",
    "adapter",
    "merge",
    "path",
    "attention",
    "gradient_checkpointing",
    "offload",
    "compile",
)
"""Settings of the model that may differ. Files may have several paths: pictures decide.

So `evaluation.model` may differ too.
"""
SAMPLER = ("steps", "guidance", "embedded_guidance")
DIFFERENT_PICTURES = 8.0
"""Mean difference of two pictures, in levels of 255, from which two models made them.

Rounding on another machine changes a picture by less.
"""
PROMPTS = ("evaluation.prompts", "data.prompts", "data.pairs")
"""Keys of evaluation prompts: the first one that is written names their file."""
PAIRS = ("evaluation.pairs", "data.pairs")
"""Keys of held-out pairs and pictures, as `PROMPTS`."""


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """The evaluation of a finished run, from the files of its folder."""

    folder: Path
    config: Section
    files: dict[str, str]
    """SHA-256 of prompt and preference files, by configuration key."""
    before: EvaluationResult
    after: EvaluationResult

    @property
    def facts(self) -> dict[str, "Fact"]:
        """The values that two evaluations must share, by configuration key."""
        model, evaluation, sampler = (
            _section(self.config, name) for name in ("model", "evaluation", "sampler")
        )
        sampler = {**sampler, **_section(evaluation, "sampler")}
        values = {
            **{f"model.{k}": value for k, value in model.items() if k not in OWN_SETTINGS},
            **{f"evaluation.sampler.{key}": sampler.get(key) for key in SAMPLER},
            # Runs of earlier versions have none.
            "evaluation.sampler.negative_prompt": sampler.get("negative_prompt") or "",
            "evaluation.images_per_prompt": evaluation.get("images_per_prompt"),
            # The noise of evaluations is drawn from this seed.
            "train.seed": _value(self.config, "train.seed"),
        }
        facts = {key: Fact(value, str(value)) for key, value in values.items()}
        prompts = self._written(PROMPTS)
        return facts | {prompts: self._file(prompts)}

    @property
    def pairs(self) -> object:
        """The entries that held-out figures come from: key and content of their file, and figures.

        A file of its own is held out as a whole, and of the training data a tenth. Only figures of
        pairs leave out ties.
        """
        key = self._written(PAIRS)
        return key, self._file(key).value, sorted(self.after.held_out)

    @property
    def rewards(self) -> dict[str, object]:
        """The code and the settings of each evaluation reward, by its name in logs."""
        section = _section(_section(self.config, "evaluation"), "rewards")
        checked = checked_rewards(section, f"{self.folder / 'config.yaml'}: evaluation.rewards")
        entries = [reward_entry(key, value) for key, value in checked.items()]
        return {entry.name: (entry.spec, entry.settings) for entry in entries}

    def _written(self, keys: Sequence[str]) -> str:
        """Return the first of these keys that the configuration has, or else the first."""
        return next((key for key in keys if _value(self.config, key)), keys[0])

    def _file(self, key: str) -> "Fact":
        path = _value(self.config, key)
        # Data sets of the hub have no checksum; their name stands for them.
        return Fact(self.files.get(key, path), str(path))


@dataclass(frozen=True)
class Fact:
    """A value that two evaluations must share."""

    value: object
    """The value, or the SHA-256 of a file."""
    text: str
    """The value, or the path of the file, as the user knows it."""


def compare_runs(folders: Sequence[Path], output: Path | None = None) -> tuple[Comparison, Path]:
    """Compare finished runs and write a page about it.

    Held-out figures count only if all runs have them from the same pairs or pictures.

    Args:
        folders: Two or more run folders. The others are compared with the first.
        output: The page; `comparison.html` beside the first run by default.

    Returns:
        The comparison and the path of the page.

    Raises:
        UserError: A run is not finished, or the evaluations do not match. The message says how.
    """
    if len(folders) < 2:
        raise UserError("A comparison needs two runs. Give the folders of two or more.")
    names = run_names(folders)
    runs = [read_run(folder) for folder in folders]
    for other in runs[1:]:
        refuse_other_evaluation(runs[0], other)
    results = [runs[0].before, *(run.after for run in runs)]
    if len({str(run.pairs) for run in runs}) > 1:
        results = [replace(result, held_out={}) for result in results]
    before, *after = results
    guided = guided_baseline(folders[0], before)
    comparison = compare_results(before, dict(zip(names, after, strict=True)), guided)
    if not comparison.scores:
        raise UserError(
            f"{' and '.join(names)} have no evaluation score in common. "
            "Give runs with a reward in common in evaluation.rewards."
        )
    page = output or folders[0].absolute().parent / "comparison.html"
    records = [read_record(folder, name) for folder, name in zip(folders, names, strict=True)]
    write_comparison(page, comparison, records, different_settings(runs))
    return comparison, page


def run_names(folders: Sequence[Path]) -> list[str]:
    """Return the names of the folders, with their parents as far as they differ."""
    paths = [folder.absolute() for folder in folders]
    for path, folder in zip(paths, folders, strict=True):
        if paths.count(path) > 1:
            raise UserError(f"{folder} is given twice. Give each run once.")
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    common = os.path.commonpath(paths)
    return [os.path.relpath(path, common) for path in paths]


def read_run(folder: Path) -> FinishedRun:
    """Read a finished run. Raises UserError if this is not one."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run, because it has no config.yaml. Give a run folder.")
    for file in (BEFORE, AFTER):
        if not (folder / file).is_file():
            raise UserError(
                f"{folder} has no {file}, so this run is not finished. "
                f"Finish it first: python train.py {folder / 'config.yaml'}"
            )
    saved = checkpoints(folder)
    return FinishedRun(
        folder=folder,
        config=read_config(folder),
        files=read_progress(saved[-1] / PROGRESS_FILE).files if saved else {},
        before=EvaluationResult.load(folder / BEFORE),
        after=EvaluationResult.load(folder / AFTER),
    )


def refuse_other_evaluation(first: FinishedRun, other: FinishedRun) -> None:
    """Raise UserError naming what differs, unless two runs were evaluated in the same way."""
    reasons = [*_different_facts(first, other), *_different_rewards(first, other)]
    if not reasons and not _same_pictures(first.before, other.before):
        reasons = ["the model without an adapter makes other pictures"]
    if reasons:
        raise UserError(
            f"{first.folder} and {other.folder} were not evaluated in the same way: "
            f"{'; '.join(reasons)}. Compare runs with the same model, evaluation and train.seed."
        )


def _different_facts(first: FinishedRun, other: FinishedRun) -> list[str]:
    nothing = Fact(None, "not set")
    reasons = []
    for key in dict.fromkeys([*first.facts, *other.facts]):
        ours, theirs = first.facts.get(key, nothing), other.facts.get(key, nothing)
        if ours.value == theirs.value:
            continue
        if ours.text == theirs.text:
            reasons.append(f"the file of {key} has changed between the runs")
        else:
            reasons.append(f"{key} is {ours.text} and {theirs.text}")
    return reasons


def _different_rewards(first: FinishedRun, other: FinishedRun) -> list[str]:
    known = first.rewards
    return [
        f"evaluation.rewards.{name} has other settings"
        for name, reward in other.rewards.items()
        if known.get(name, reward) != reward
    ]


def different_settings(runs: Sequence[FinishedRun]) -> dict[str, list[str]]:
    """Return the settings that differ between runs: the value of every run, by key."""
    first, *others = (run.config for run in runs)
    keys = dict.fromkeys(key for other in others for key in differing(first, other))
    keys.pop("output", None)
    return {key: [str(_value(run.config, key)) for run in runs] for key in keys}


def _same_pictures(ours: EvaluationResult, theirs: EvaluationResult) -> bool:
    if ours.images.shape != theirs.images.shape or not ours.prompt.equal(theirs.prompt):
        return False
    difference = (ours.images.float() - theirs.images.float()).abs()
    return not len(difference) or bool(difference.mean() < DIFFERENT_PICTURES)


def _section(config: Section, key: str) -> dict[str, Any]:
    section = config.get(key)
    return section if isinstance(section, dict) else {}


def _value(config: Section, key: str) -> object:
    """Return the value of a dotted key, or None."""
    value: object = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
