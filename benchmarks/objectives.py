"""Train the rows of a table on the same work, several seeds each, and compare them.

    python benchmarks/objectives.py [TABLE.yaml] [--rows crd awm] [--seeds 3] [--workers 2]
                                    [--minutes 60]

A table (benchmarks/tables/*.yaml) names the rows: a file of configs/tiny, and what is changed in
it. All rows have the same model, prompts, images and seeds. For each row the comparison gives the
gain after 4,000 images, the images to a strict score of 0.8 and 0.9, the final score, its
difference from the guided model, the tiny CLIP's score, which can be hacked, how different the
images of a prompt still are, and how far the velocities moved. Writes table.md, results.json and
curves.png. Finished runs are not repeated.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, pairwise, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypedDict

import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from flowalign.batch import Keys, Prompts
from flowalign.config.load import load_config
from flowalign.config.paths import STARTED_IN
from flowalign.config.sections import Config
from flowalign.data.prompts import read_prompts
from flowalign.flow import add_noise, mean_square
from flowalign.models import load_model
from flowalign.objectives.draws import ForwardTimes
from flowalign.policy import Policy
from flowalign.reporting.trackers import read_metrics
from flowalign.rewards.clip import ClipScore
from flowalign.rollouts.collect import collect, make_prompts
from flowalign.runs.adapter import load_adapter

ROOT = Path(__file__).parents[1]
TABLES = ROOT / "benchmarks" / "tables"
REWARDS = "{scene_match: 1.0, scene_match_graded: 1.0, clip_score: 1.0}"
EARLY = 4000
TARGETS = (0.8, 0.9)
DIVERSITY_PROMPTS, DIVERSITY_IMAGES = 20, 8
PLOT_COLUMNS = 4

Point = dict[str, float]
"""An evaluation: images and seconds of training so far, and a score for each reward."""


class Comparison(TypedDict):
    """The trained policy compared with the reference."""

    diversity_before: float
    diversity_after: float
    velocity_moved: float


class Result(Comparison):
    """A run: its evaluations in order, its summary, its machine and the policy's measures."""

    points: list[Point]
    summary: dict[str, Any]
    environment: dict[str, Any]
    seconds: float
    """Seconds of training: the median step's, times the steps. Other work slows some of them."""


Results = dict[str, list[Result]]
"""For each row, its runs by seed."""


@dataclass(frozen=True)
class Row:
    """A row of a table: what is trained."""

    file: str
    """Name of a file in configs/tiny."""
    set: dict[str, object] = field(default_factory=dict)
    """What is changed in the file: values by dotted keys."""
    images: int | None = None
    """Images that each run generates, if they differ from the table's."""


@dataclass(frozen=True)
class Table:
    """The content of a table's file."""

    name: str
    images: int
    """Images that each run generates."""
    evaluate_every: int
    """Images between two evaluations."""
    rows: dict[str, Row]
    set: dict[str, object] = field(default_factory=dict)
    """What is changed in the files of all rows."""
    score: str = "scene_match"
    """The score that the curves show and the rows are sorted by."""


@dataclass(frozen=True)
class Job:
    """One run: a row, a seed and its folder."""

    row: str
    seed: int
    command: tuple[str, ...]
    folder: Path


def main() -> None:
    """Train what is not trained yet, and write the comparison after every run."""
    options = parse_options()
    table = read_table(options.table)
    output = options.output / table.name
    deadline = time.monotonic() + 60 * options.minutes
    unknown = set(options.rows or ()) - set(table.rows)
    if unknown:
        sys.exit(f"{min(unknown)} is not a row of {options.table}. Its rows: {[*table.rows]}.")
    # Seed by seed: a benchmark that is stopped early has compared all rows, on fewer seeds.
    jobs = [
        make_job(table, row, seed, output)
        for seed, row in product(range(options.seeds), table.rows)
    ]
    chosen = [job for job in jobs if job.row in (options.rows or table.rows)]
    for _ in finished(chosen, options.workers, deadline):
        # After every run: a benchmark of hours can be read while it goes, and interrupted.
        report(best_first(read_runs(table, jobs), table.score), table.score, output)
    summary = output / "table.md"
    print(summary.read_text() if summary.exists() else "No run has ended.")


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("table", nargs="?", type=Path, default=TABLES / "objectives.yaml", help="a table's file")
    add("--rows", nargs="+", metavar="ROW", help="rows to train, all by default")
    add("--seeds", type=int, default=3)
    add("--workers", type=int, default=2, help="runs at a time, each with one thread")
    add("--minutes", type=float, default=math.inf, help="stop then; the next call goes on")
    add("--output", type=Path, default=Path("outputs"), help="folder of the table's folder")
    return parser.parse_args()


def read_table(file: Path) -> Table:
    """Read a table's file."""
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    rows = {name: Row(**row) for name, row in content.pop("rows").items()}
    return Table(name=file.stem, rows=rows, **content)


def make_job(table: Table, name: str, seed: int, output: Path) -> Job:
    """Return the run of a row with a seed."""
    row = table.rows[name]
    file, folder = ROOT / "configs" / "tiny" / f"{row.file}.yaml", output / f"{slug(name)}-{seed}"
    overrides = [f"{key}={json.dumps(value)}" for key, value in (table.set | row.set).items()]
    train = load_config(file, overrides).train
    per_step = train.prompts_per_step * train.images_per_prompt
    settings = {
        "train.seed": seed,
        "train.steps": math.ceil((row.images or table.images) / per_step),
        "train.evaluate_every": max(1, table.evaluate_every // per_step),
        "evaluation.rewards": REWARDS,
        "output": folder.resolve(),
    }
    overrides += [f"{key}={value}" for key, value in settings.items()]
    return Job(name, seed, (sys.executable, "train.py", str(file), *overrides), folder)


def slug(name: str) -> str:
    """Return a row's name as a folder's name."""
    return "".join(c if c.isalnum() or c in "._" else "-" for c in name)


def finished(jobs: Sequence[Job], workers: int, deadline: float) -> Iterator[Job]:
    """Run the jobs, some at a time, and yield each that ends before the deadline."""
    # Processes that are spawned do not inherit a GPU's state.
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        futures = {pool.submit(run, job, deadline): job for job in jobs}
        for future in as_completed(futures):
            if future.result():
                yield futures[future]


def run(job: Job, deadline: float) -> bool:
    """Train and measure a run, unless that is done. Returns False if the time is over."""
    torch.set_num_threads(1)
    if not is_done(job.folder / "summary.json"):
        seconds = deadline - time.monotonic()
        if seconds <= 0 or not train(job, seconds):
            return False
    measures = job.folder / "comparison.json"
    if not measures.exists():
        measures.write_text(json.dumps(compare_policies(job.folder)))
    return True


def train(job: Job, seconds: float) -> bool:
    """Train in a process of its own, which an interrupted benchmark resumes."""
    timeout = None if math.isinf(seconds) else seconds
    try:
        # A process of its own also frees all memory of the run before.
        subprocess.run(job.command, cwd=ROOT, check=True, timeout=timeout, capture_output=True)
    except subprocess.TimeoutExpired:
        return False
    except subprocess.CalledProcessError as error:
        # A fault of one row should not end the comparison of the others.
        print(f"{job.folder} failed: {error.stderr.decode()[-2000:]}", file=sys.stderr)
        return False
    return True


def is_done(summary: Path) -> bool:
    """True if the run ended and was not interrupted."""
    return summary.exists() and json.loads(summary.read_text())["stopped"] != "interrupted"


def read_runs(table: Table, jobs: Sequence[Job]) -> Results:
    """Return the finished runs of each row that has any."""
    results: Results = {}
    for job in jobs:
        if (job.folder / "comparison.json").exists():
            results.setdefault(job.row, []).append(read_run(job.folder))
    return {name: results[name] for name in table.rows if name in results}


def read_run(folder: Path) -> Result:
    """Return what a finished run's folder holds."""
    summary = json.loads((folder / "summary.json").read_text())
    environment = json.loads((folder / "environment.json").read_text())
    # A folder of the machine that ran it says nothing elsewhere.
    environment.pop(STARTED_IN, None)
    comparison: Comparison = json.loads((folder / "comparison.json").read_text())
    return {
        "points": evaluations(folder, summary),
        "summary": summary,
        "environment": environment,
        "seconds": typical_seconds(folder),
        **comparison,
    }


def typical_seconds(folder: Path) -> float:
    """Return the seconds of a run's training as if each step had taken the median step's time."""
    ends = [0.0, *(line["seconds"] for line in read_metrics(folder))]
    return (len(ends) - 1) * statistics.median(after - before for before, after in pairwise(ends))


def read_results(file: Path) -> Results:
    """Return the runs that a results.json holds."""
    return json.loads(file.read_text(encoding="utf-8"))["results"]


def best_first(results: Results, score: str) -> Results:
    """Sort by the median of the final scores."""

    def final(name: str) -> float:
        return statistics.median(run["points"][-1][score] for run in results[name])

    return {name: results[name] for name in sorted(results, key=final, reverse=True)}


def evaluations(folder: Path, summary: dict) -> list[Point]:
    """Return the evaluations of a run: before, during and after training."""
    # Evaluations before, during and after training use the same prompts and noise.
    points = [{"images": 0, "seconds": 0.0, **summary["before"]}]
    for line in read_metrics(folder):
        if "eval/scene_match" in line:
            point = {key: line[key] for key in ("images", "seconds")}
            scores = {k.removeprefix("eval/"): v for k, v in line.items() if k.startswith("eval/")}
            points.append(point | scores)
    points.append({"images": summary["images"], "seconds": summary["seconds"], **summary["after"]})
    return points


@torch.no_grad()
def compare_policies(folder: Path) -> Comparison:
    """Measure the diversity before and after training, and how far the velocities moved."""
    config = load_config(folder / "config.yaml")
    images_per_pass = config.train.images_per_pass
    model = load_model(config.model)
    policy = Policy(model, config.evaluation_sampler, images_per_pass=images_per_pass)
    load_adapter(policy, folder / "adapter")
    batch = evaluation_batch(policy, config)
    before, after = policy.at("reference"), policy.at("policy")
    rollout = collect(before, batch, images_per_pass, "evaluation")
    moved = []
    # Both policies see the same noisy images, those of the reference.
    for draw in ForwardTimes(count=4)(rollout):
        xt, _ = add_noise(rollout.x0, draw.t, draw.noise)
        v, v_ref = (view.velocity(xt, draw.t, batch.cond) for view in (after, before))
        moved.append((mean_square(v - v_ref) / mean_square(v_ref)).mean().item())
    return {
        "diversity_before": diversity(before, batch),
        "diversity_after": diversity(after, batch),
        "velocity_moved": statistics.mean(moved),
    }


def evaluation_batch(policy: Policy, config: Config) -> Prompts:
    """Return DIVERSITY_IMAGES rows for each of the first evaluation prompts."""
    prompts = read_prompts(config.evaluation.prompts)[:DIVERSITY_PROMPTS]
    rows = list(product(range(len(prompts)), range(DIVERSITY_IMAGES)))
    keys = Keys.evaluation(0, rows)
    return make_prompts(policy, [prompts[prompt] for prompt, _ in rows], keys)


def diversity(view: Policy, batch: Prompts) -> float:
    """Return 1 - the cosine between CLIP features of two images of a prompt, averaged.

    The features are those of the tiny CLIP. The mean is over all pairs and then over prompts.
    """
    rollout = collect(view, batch, view.images_per_pass or len(batch), "evaluation")
    clip = ClipScore()
    pixels = clip._pixels(rollout.images.float() / 255)
    features: Tensor = clip.model.get_image_features(pixels).pooler_output
    features = F.normalize(features, dim=1).view(-1, DIVERSITY_IMAGES, features.shape[1])
    cosines = features @ features.transpose(1, 2)
    # The diagonal compares every image with itself: DIVERSITY_IMAGES cosines of 1.
    pairs = DIVERSITY_IMAGES * (DIVERSITY_IMAGES - 1)
    return (1 - (cosines.sum((1, 2)) - DIVERSITY_IMAGES) / pairs).mean().item()


def until(points: list[Point], target: float) -> Point | None:
    """Return the first evaluation that reaches the strict score, if one does."""
    return next((point for point in points if point["scene_match"] >= target), None)


def gain(points: list[Point], images: int) -> float:
    """Return the gain of the strict score at the last evaluation within a number of images."""
    within = [point for point in points if point["images"] <= images]
    return within[-1]["scene_match"] - points[0]["scene_match"]


def report(results: Results, score: str, folder: Path) -> None:
    """Write table.md, results.json, curves.png and seconds.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text("\n".join(table_lines(results)) + "\n")
    (folder / "results.json").write_text(json.dumps({"results": results}, indent=2))
    plot(results, score, "images", folder / "curves.png")
    plot(results, score, "seconds", folder / "seconds.png")


def table_lines(results: Results) -> list[str]:
    """Return the lines of a Markdown table with one line for each row."""
    targets = [f"images to {target}" for target in TARGETS]
    columns = ["strict", "above guided", "CLIP", "diversity", "moved", "s"]
    head = ["row", f"gain, {EARLY:,} images", *targets, *columns]
    rows = [" | ".join([name, *cells(runs)]) for name, runs in results.items()]
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {row} |" for row in rows)]


def cells(runs: list[Result]) -> list[str]:
    """Return the cells of a row, but for its name."""
    ends = [run["points"][-1] for run in runs]
    clip_gains = [run["points"][-1]["clip_score"] - run["points"][0]["clip_score"] for run in runs]
    diversities = [run["diversity_after"] / run["diversity_before"] for run in runs]
    return [
        spread([gain(run["points"], EARLY) for run in runs], "+.3f"),
        *(to_target([until(run["points"], target) for run in runs]) for target in TARGETS),
        spread([end["scene_match"] for end in ends], ".3f"),
        above_guided(runs),
        spread(clip_gains, "+.3f"),
        spread(diversities, ".2f"),
        spread([run["velocity_moved"] for run in runs], ".3f"),
        f"{statistics.median(run['seconds'] for run in runs):.0f}",
    ]


def above_guided(runs: list[Result]) -> str:
    """Describe by how much the strict score ends above that of the guided model."""
    baselines = [run["summary"].get("baseline_guided") for run in runs]
    # A table may leave the guided model out.
    if None in baselines:
        return "-"
    guided = [baseline["means"]["scene_match"] for baseline in baselines]
    gains = [run["points"][-1]["scene_match"] - w for run, w in zip(runs, guided, strict=True)]
    return spread(gains, "+.3f")


def to_target(points: list[Point | None]) -> str:
    """Describe the median images of the runs that reached a target."""
    reached = [point["images"] for point in points if point]
    if not reached:
        return "no"
    return f"{statistics.median(reached):,.0f} ({len(reached)} of {len(points)})"


def spread(values: list[float], form: str) -> str:
    """Describe the median, the least and the greatest value."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def plot(results: Results, score: str, axis: str, path: Path) -> None:
    """Draw one panel for each row: its curves in blue, all others in grey."""
    rows = math.ceil(len(results) / PLOT_COLUMNS)
    figure = Figure(figsize=(3 * PLOT_COLUMNS, 2.4 * rows), layout="constrained")
    grid = figure.subplots(rows, PLOT_COLUMNS, sharex=True, sharey=True, squeeze=False)
    panels: Sequence[Axes] = grid.flatten()
    for axes, (name, runs) in zip(panels, results.items(), strict=False):
        for run in chain.from_iterable(results.values()):
            axes.plot(*curve(run, score, axis), color="#ddd", linewidth=0.8)
        for run in runs:
            axes.plot(*curve(run, score, axis), color="#2d52d6", linewidth=1.4)
        axes.set_title(name, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    # The grid may have more panels than there are rows.
    for axes in panels[len(results) :]:
        axes.set_visible(False)
    figure.supxlabel(axis, fontsize=9)
    figure.supylabel(f"{score}, prompts not trained on", fontsize=9)
    figure.savefig(path, dpi=110)


def curve(run: Result, score: str, axis: str) -> tuple[list[float], list[float]]:
    """Return a score of a run over its images or seconds."""
    return [point[axis] for point in run["points"]], [point[score] for point in run["points"]]


if __name__ == "__main__":
    main()
