"""Train with every objective on the same work, and compare them.

    python benchmarks/objectives.py [NAME ...] [--images 6000] [--set KEY=VALUE ...]

Runs configs/tiny/NAME.yaml from the same model, prompts and seeds. For each it prints the gain
after 4,000 images, images and seconds to a strict score of 0.8 and 0.9, the final score, the tiny
CLIP's score, which can be hacked, how different the images of a prompt still are, and how far the
velocities moved. Writes table.md, results.json and curves.png, and keeps what results.json holds of
other names. Finished runs are not repeated.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from itertools import chain, product
from pathlib import Path
from typing import TypedDict

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from flowalign.batch import Keys, Prompts
from flowalign.config.load import load_config
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
from flowalign.runs.environment import environment

ROOT = Path(__file__).parents[1]
ONLINE = (
    "flow_grpo",
    "ddpo",
    "d3po",
    "prdp",
    "nft",
    "awm",
    "crd",
    "dgpo",
    "rwr",
    "raft",
    "dpo_online",
    "kto_online",
)
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
    """A run: its evaluations in order, its summary, and the trained policy's measures."""

    points: list[Point]
    summary: dict[str, object]


Results = dict[str, list[Result]]
"""For each objective, its runs by seed."""


def main() -> None:
    """Train what is not trained yet, and write the comparison after every run."""
    options = parse_options()
    torch.set_num_threads(1)
    results: Results = {}
    for name, seed in product(options.names, range(options.seeds)):
        results.setdefault(name, []).append(measure(name, seed, options))
        # After every run: a benchmark of hours can be read while it goes, and interrupted.
        report(best_first(read_results(options.output) | results), options.output)
    print((options.output / "table.md").read_text())


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("names", nargs="*", default=ONLINE, help="names of files in configs/tiny")
    add("--images", type=int, default=6000, help="images that each run generates")
    add("--evaluate-every", type=int, default=1920, help="images between evaluations")
    add("--seeds", type=int, default=3)
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the files")
    add("--output", type=Path, default=Path("outputs/objectives"))
    return parser.parse_args()


def read_results(folder: Path) -> Results:
    """Return the runs that results.json holds."""
    path = folder / "results.json"
    return json.loads(path.read_text())["results"] if path.exists() else {}


def best_first(results: Results) -> Results:
    """Sort by the median of the final strict scores."""

    def score(name: str) -> float:
        return statistics.median(run["points"][-1]["scene_match"] for run in results[name])

    return {name: results[name] for name in sorted(results, key=score, reverse=True)}


def measure(name: str, seed: int, options: argparse.Namespace) -> Result:
    """Train one run unless it is finished, and measure it."""
    folder = options.output / f"{name}-{seed}"
    if not is_done(folder / "summary.json"):
        train(name, seed, folder, options)
    summary = json.loads((folder / "summary.json").read_text())
    return {"points": evaluations(folder, summary), "summary": summary, **compare_policies(folder)}


def train(name: str, seed: int, folder: Path, options: argparse.Namespace) -> None:
    """Train in a process of its own, which an interrupted benchmark resumes."""
    file = ROOT / "configs" / "tiny" / f"{name}.yaml"
    config = load_config(file)
    per_step = config.train.prompts_per_step * config.train.images_per_prompt
    settings = {
        "train.seed": seed,
        "train.steps": math.ceil(options.images / per_step),
        "train.evaluate_every": max(1, options.evaluate_every // per_step),
        "evaluation.rewards": REWARDS,
        "output": folder,
    }
    overrides = [*(f"{key}={value}" for key, value in settings.items()), *options.set]
    # A process of its own also frees all memory of the run before.
    subprocess.run([sys.executable, "train.py", str(file), *overrides], cwd=ROOT, check=True)


def is_done(summary: Path) -> bool:
    """True if the run ended and was not interrupted."""
    return summary.exists() and json.loads(summary.read_text())["stopped"] != "interrupted"


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


def report(results: Results, folder: Path) -> None:
    """Write table.md, results.json and curves.png."""
    targets = [f"to {target}" for target in TARGETS]
    columns = ["strict", "CLIP", "diversity", "moved", "s"]
    head = ["objective", f"gain, {EARLY:,} images", *targets, *columns]
    rows = [" | ".join([name, *cells(runs)]) for name, runs in results.items()]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {row} |" for row in rows)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    record = {"environment": environment(torch.device("cpu"), 1), "results": results}
    (folder / "results.json").write_text(json.dumps(record, indent=2))
    plot(results, folder / "curves.png")


def cells(runs: list[Result]) -> list[str]:
    """Return the cells of an objective, but for its name."""
    ends = [run["points"][-1] for run in runs]
    clip_gains = [run["points"][-1]["clip_score"] - run["points"][0]["clip_score"] for run in runs]
    diversities = [run["diversity_after"] / run["diversity_before"] for run in runs]
    return [
        spread([gain(run["points"], EARLY) for run in runs], "+.3f"),
        *(to_target([until(run["points"], target) for run in runs]) for target in TARGETS),
        spread([end["scene_match"] for end in ends], ".3f"),
        spread(clip_gains, "+.3f"),
        spread(diversities, ".2f"),
        spread([run["velocity_moved"] for run in runs], ".3f"),
        f"{statistics.median(end['seconds'] for end in ends):.0f}",
    ]


def to_target(points: list[Point | None]) -> str:
    """Describe the median images and seconds of the runs that reached a target."""
    reached = [point for point in points if point]
    if not reached:
        return "no"
    images = statistics.median(point["images"] for point in reached)
    seconds = statistics.median(point["seconds"] for point in reached)
    return f"{images:,.0f} images, {seconds:.0f} s ({len(reached)} of {len(points)})"


def spread(values: list[float], form: str) -> str:
    """Describe the median, the least and the greatest value."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def plot(results: Results, path: Path) -> None:
    """Draw one panel for each objective: its curves in blue, all others in grey."""
    rows = math.ceil(len(results) / PLOT_COLUMNS)
    figure = Figure(figsize=(3 * PLOT_COLUMNS, 2.4 * rows), layout="constrained")
    grid = figure.subplots(rows, PLOT_COLUMNS, sharex=True, sharey=True, squeeze=False)
    panels: Sequence[Axes] = grid.flatten()
    for axes, (name, runs) in zip(panels, results.items(), strict=False):
        for run in chain.from_iterable(results.values()):
            draw_curve(axes, run, color="#ddd", linewidth=0.8)
        for run in runs:
            draw_curve(axes, run, color="#2d52d6", linewidth=1.4)
        axes.set_title(name, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    # The grid may have more panels than there are objectives.
    for axes in panels[len(results) :]:
        axes.set_visible(False)
    figure.supxlabel("images generated", fontsize=9)
    figure.supylabel("strict score, prompts not trained on", fontsize=9)
    figure.savefig(path, dpi=110)


def draw_curve(axes: Axes, run: Result, color: str, linewidth: float) -> None:
    """Draw the strict score of a run over its images."""
    images = [point["images"] for point in run["points"]]
    scores = [point["scene_match"] for point in run["points"]]
    axes.plot(images, scores, color=color, linewidth=linewidth)


if __name__ == "__main__":
    main()
