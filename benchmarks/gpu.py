"""Measure steps of networks of published size on a GPU, by `throughput.py`.

    python benchmarks/gpu.py [--rows NAME ...] [--repetitions 2] [--output FILE.json]
    python benchmarks/gpu.py --count h200 [--rows NAME ...]

Every row has random weights, 512 × 512 pictures, Flow-GRPO, and one pass for a step. A row is
printed as soon as it is measured. A row that fails is printed with its error, and the next begins.
With --count, nothing is measured: `flowalign plan` counts the same rows for a GPU by name.
"""

import argparse
import gc
import json
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import throughput
import torch

from flowalign.diagnostics.plan import GPUS, step_seconds
from flowalign.diagnostics.rehearsal import rehearse

MEDIUM = [
    "sampler.steps=4",
    "sampler.guidance=4.5",
    "train.prompts_per_step=2",
    "train.images_per_prompt=4",
    "rewards={brightness: 1.0}",
]
"""8 images in a pass, 16 rows with the empty prompt, of which three steps are trained."""
FLUX = [
    "sampler.steps=3",
    "train.prompts_per_step=2",
    "train.images_per_prompt=2",
    "rewards={brightness: 1.0}",
]
"""4 images in a pass, two trained steps, without guidance."""
RECOMPUTED = "model.gradient_checkpointing=true"
NO_NULL, COMPILED = "objective.train_null_branch=false", "model.compile=true"
ROWS: dict[str, tuple[str, list[str]]] = {
    "medium": ("sd3.5-medium", MEDIUM),
    "medium, xformers": ("sd3.5-medium", [*MEDIUM, "model.attention=xformers"]),
    "medium, null branch off": ("sd3.5-medium", [*MEDIUM, NO_NULL]),
    "medium, recomputed": ("sd3.5-medium", [*MEDIUM, RECOMPUTED]),
    "medium, int8": ("sd3.5-medium", [*MEDIUM, "model.quantize=int8"]),
    "medium, nf4": ("sd3.5-medium", [*MEDIUM, "model.quantize=nf4"]),
    "flux": ("flux-dev", FLUX),
    "flux, recomputed": ("flux-dev", [*FLUX, RECOMPUTED]),
    "flux, nf4, recomputed": ("flux-dev", [*FLUX, RECOMPUTED, "model.quantize=nf4"]),
    "medium, compiled": ("sd3.5-medium", [*MEDIUM, COMPILED]),
    "medium, compiled, null branch off": ("sd3.5-medium", [*MEDIUM, COMPILED, NO_NULL]),
}
PUBLISHED = {
    "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "flux-dev": "black-forest-labs/FLUX.1-dev",
}
"""Models whose configuration files come with the package, by architecture."""
COLUMNS = {
    "step_seconds": "step, s",
    "step_over_base": "/ base",
    "step_over_adapted": "/ adapted",
    "step_over_estimate": "/ estimate",
    "rollout_over_base": "rollout / base",
    "rollout_over_adapted": "/ adapted",
    "peak_memory_bytes": "peak, GB",
}


def measure(architecture: str, settings: list[str], repetitions: int) -> dict[str, Any]:
    """Return what `throughput.py` measures in a run."""
    options = throughput.make_parser().parse_args(["--architecture", architecture, *settings])
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    bench = throughput.build(options)
    seconds = bench.measure(repetitions, time.perf_counter)
    results = throughput.summarise(bench, seconds, throughput.known_gpu())
    return results | {"repetitions": seconds}


def count(architecture: str, settings: list[str], gpu: str) -> str:
    """Return the cells of a row that is counted: seconds of a step, and the most memory."""
    options = throughput.make_parser().parse_args(["--architecture", architecture, *settings])
    config = throughput.make_config(options)
    plan = rehearse(replace(config, model=replace(config.model, path=PUBLISHED[architecture])))
    cells = [f"{step_seconds(plan.work, GPUS[gpu]):.3g}"]
    for phase in ("in an update", "in an evaluation"):
        cells.append(f"{plan.peaks[phase] / 1e9:.3g}")
    return " | ".join(cells)


def table_row(name: str, results: dict[str, Any]) -> str:
    """Return a row of a Markdown table."""
    figures = {key: results.get(key) for key in COLUMNS}
    figures["peak_memory_bytes"] = results["peak_memory_bytes"] / 1e9
    cells = ["" if value is None else f"{value:.3g}" for value in figures.values()]
    return f"| {' | '.join([name, *cells])} |"


def main() -> None:
    """Print the rows, and write them where --output says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=[*ROWS], choices=ROWS, metavar="NAME")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    parser.add_argument("--count", choices=GPUS, metavar="GPU", help="count, without a GPU")
    options = parser.parse_args()
    if options.count:
        print("| row | step, s | update, GB | evaluation, GB |\n|---|---|---|---|")
        for name in options.rows:
            print(f"| {name} | {count(*ROWS[name], options.count)} |", flush=True)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record: dict[str, Any] = {"environment": throughput.environment(device, 1), "rows": {}}
    print(f"| row | {' | '.join(COLUMNS.values())} |")
    print("|---" * (1 + len(COLUMNS)) + "|")
    for name in options.rows:
        try:
            results = measure(*ROWS[name], options.repetitions)
            print(table_row(name, results), flush=True)
        except Exception as error:
            traceback.print_exc()
            results = {"error": f"{type(error).__name__}: {error}"}
            print(f"| {name} | {results['error']} |", flush=True)
        record["rows"][name] = results
        # A row has more than half of the memory of a GPU.
        gc.collect()
        torch.cuda.empty_cache()
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
