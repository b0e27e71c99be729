"""The benchmarks, on the smallest work that shows what they measure."""

import importlib
import json
import math
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from flowalign.config.load import load_config
from flowalign.diagnostics.plan import GPUS

FOLDER = Path(__file__).parents[1] / "benchmarks"
PROMPTS = Path(__file__).parent / "prompts.jsonl"


@pytest.fixture
def benchmark(monkeypatch):
    """Return a function that calls a benchmark by its name, with arguments."""
    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()

    def call(name: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        importlib.import_module(name).main()

    yield call
    torch.set_num_threads(threads)


SMALL_STEP = [
    "sampler.steps=3",
    "train.prompts_per_step=2",
    "train.images_per_prompt=2",
    "train.images_per_pass=2",
]


def test_throughput_counts_the_calls_of_a_step(benchmark, tmp_path):
    settings = [*SMALL_STEP, "sampler.guidance=3", "objective.train_null_branch=false"]
    options = ["--repetitions", "1", "--output", str(tmp_path / "figures.json")]
    benchmark("throughput", *settings, *options)
    results = json.loads((tmp_path / "figures.json").read_text())["results"]
    # Two passes. The empty prompt has calls of its own in three sampler steps, two of them trained.
    assert results["forwards"] == 2 * (2 * 3 + 2)
    assert results["forwards_and_backwards"] == 2 * 2
    assert results["estimated_seconds"] == {}
    for part in ("rollout", "step"):
        for network in ("base", "adapted"):
            assert results[f"{part}_over_{network}"] > 0


def test_a_table_of_gpu_figures_has_an_estimate_and_names_what_failed(
    benchmark, monkeypatch, tmp_path, capsys
):
    """On a CPU, as if it were an H100, with a network of two blocks."""
    architectures, gpu = map(importlib.import_module, ("architectures", "gpu"))
    sizes = {"num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128}
    pipeline = architectures.RandomSD3SmallPipeline
    monkeypatch.setattr(pipeline, "transformer_config", architectures.SD3_SMALL | sizes)
    widths = {"block_out_channels": (32,) * 4}
    monkeypatch.setattr(pipeline, "vae_config", architectures.AUTOENCODER | widths)
    monkeypatch.setattr(gpu.throughput, "known_gpu", lambda: GPUS["h100"])
    small = [*SMALL_STEP, "rewards={brightness: 1.0}", "model.height=64", "model.width=64"]
    rows = {"small": ("sd3-small", small), "broken": ("sd3-small", [*small, "sampler.step=2"])}
    monkeypatch.setattr(gpu, "ROWS", rows)
    file = tmp_path / "figures.json"
    benchmark("gpu", "--repetitions", "1", "--output", str(file))
    measured = json.loads(file.read_text())["rows"]
    estimate = measured["small"]["estimated_seconds"]
    # Four trained forwards with their backwards, of six forwards in all.
    assert 1 < estimate["base backwards"] / estimate["base forwards"] < 3
    assert measured["small"]["step_over_estimate"] > 1
    assert "Did you mean 'steps'?" in measured["broken"]["error"]
    assert "| broken | UserError: " in capsys.readouterr().out


def test_every_second_of_a_run_belongs_to_one_of_its_parts(benchmark, tmp_path):
    few = ["train.steps=2", "train.save_every=1", "sampler.steps=2", "evaluation.sampler.steps=2"]
    few += ["evaluation.images_per_prompt=1", f"evaluation.prompts={PROMPTS}"]
    few += ["evaluation.guidance_sweep=[]", "train.prompts_per_step=2"]
    few += ["train.images_per_prompt=4", "objective.times.count=1"]
    began = time.perf_counter()
    benchmark("whole_run", "tiny/crd.yaml", *few, "--output", str(tmp_path / "figures.json"))
    whole = time.perf_counter() - began
    record = json.loads((tmp_path / "figures.json").read_text())
    assert 0 < sum(record["seconds"].values()) <= whole
    parts = "start, text encoding, sampling, rewards, updates, evaluations, checkpoints, report"
    for part in parts.split(", "):
        assert any(name.startswith(part) for name in record["seconds"]), part
    assert record["memory"] == {}


def test_what_backpropagation_keeps_does_not_grow_with_its_steps(benchmark, tmp_path):
    benchmark("backprop_memory", "--output", str(tmp_path / "figures.json"))
    kept = json.loads((tmp_path / "figures.json").read_text())["recomputed"]
    assert kept["10"] <= 1.3 * kept["2"]


@pytest.mark.usefixtures("benchmark")
def test_the_first_evaluation_that_reaches_a_target_counts():
    objectives = importlib.import_module("objectives")
    curve = {0: 0.4, 3840: 0.7, 5760: 0.85}
    points = [
        {"images": images, "seconds": images / 40, "scene_match": score}
        for images, score in curve.items()
    ]
    assert objectives.gain(points, 4000) == pytest.approx(0.3)
    assert objectives.until(points, 0.8)["images"] == 5760
    assert objectives.until(points, 0.9) is None


@pytest.mark.usefixtures("benchmark")
def test_an_interrupted_run_is_not_finished(tmp_path):
    objectives, summary = importlib.import_module("objectives"), tmp_path / "summary.json"
    assert not objectives.is_done(summary)
    for stopped, done in (("interrupted", False), ("finished", True), ("eval/diversity", True)):
        summary.write_text(json.dumps({"stopped": stopped}))
        assert objectives.is_done(summary) == done


@pytest.mark.usefixtures("benchmark")
def test_rows_are_compared_in_a_table_and_a_plot(tmp_path):
    objectives = importlib.import_module("objectives")

    def run(rise: float) -> dict[str, object]:
        steps = ((images, 0.4 + rise * images / 6000) for images in (0, 2000, 4000, 6000))
        points = [
            {"images": i, "seconds": i / 40, "scene_match": score, "clip_score": score / 2}
            for i, score in steps
        ]
        return {
            "points": points,
            "summary": {"baseline_guided": {"means": {"scene_match": 0.5}} if rise > 0.1 else None},
            "diversity_before": 0.4,
            "diversity_after": 0.2,
            "velocity_moved": 0.125,
            "seconds": 150.0,
        }

    objectives.report({"slow": [run(0.1)] * 3}, "scene_match", tmp_path)
    both = objectives.read_results(tmp_path / "results.json") | {
        "quick": [run(0.6), run(0.45), run(0.3)]
    }
    objectives.report(objectives.best_first(both, "scene_match"), "scene_match", tmp_path)
    table = (tmp_path / "table.md").read_text().splitlines()
    cells = [
        "quick",
        "+0.300 (+0.200 to +0.400)",
        "5,000 (2 of 3)",
        "6,000 (1 of 3)",
        "0.850 (0.700 to 1.000)",
        "+0.350 (+0.200 to +0.500)",
        "+0.225 (+0.150 to +0.300)",
        "0.50 (0.50 to 0.50)",
        "0.125 (0.125 to 0.125)",
        "150",
    ]
    assert table[2] == f"| {' | '.join(cells)} |"
    assert table[3].startswith(
        "| slow | +0.067 (+0.067 to +0.067) | no | no | 0.500 (0.500 to 0.500) | - |"
    )
    for plot in ("curves.png", "seconds.png"):
        assert Image.open(tmp_path / plot).size[0] > 1000


@pytest.mark.usefixtures("benchmark")
@pytest.mark.parametrize("file", sorted(FOLDER.glob("tables/*.yaml")), ids=lambda path: path.stem)
def test_every_row_of_a_shipped_table_is_a_valid_configuration(file, tmp_path):
    objectives = importlib.import_module("objectives")
    table = objectives.read_table(file)
    jobs = [objectives.make_job(table, name, 1, tmp_path) for name in table.rows]
    # Two rows in one folder would be one run.
    assert len({job.folder for job in jobs}) == len(table.rows)
    for job in jobs:
        config = load_config(Path(job.command[2]), job.command[3:])
        assert config.train.seed == 1


@pytest.mark.usefixtures("benchmark")
def test_the_calls_in_the_documentation_parse(monkeypatch):
    objectives, root = importlib.import_module("objectives"), FOLDER.parent
    pages = [page.read_text(encoding="utf-8") for page in (root / "docs").rglob("*.md")]
    calls = re.findall(r"^python benchmarks/objectives\.py.*$", "\n".join(pages), re.MULTILINE)
    assert len(calls) >= 2
    for call in calls:
        monkeypatch.setattr(sys, "argv", call.split()[1:])
        assert (root / objectives.parse_options().table).is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("benchmark")
def test_a_row_is_trained_measured_and_not_repeated(tmp_path):
    objectives = importlib.import_module("objectives")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\ntwo squares\n")
    small = {"train.prompts_per_step": 2, "train.images_per_prompt": 2, "train.images_per_pass": 4}
    row = objectives.Row("crd", small | {"evaluation.prompts": str(prompts)})
    table = objectives.Table("small", images=8, evaluate_every=4, rows={"crd, small": row})
    jobs = [objectives.make_job(table, "crd, small", 0, tmp_path)]
    assert objectives.run(jobs[0], math.inf)
    (result,) = objectives.read_runs(table, jobs)["crd, small"]
    assert [point["images"] for point in result["points"]] == [0, 4, 8, 8]
    assert 0 < result["diversity_after"] < 1
    # The time is over, so the run counts only because it is done.
    assert objectives.run(jobs[0], -math.inf)


@pytest.mark.usefixtures("benchmark")
def test_a_run_does_not_begin_after_the_last_minute(tmp_path):
    objectives = importlib.import_module("objectives")
    table = objectives.Table("small", 8, 4, {"crd": objectives.Row("crd")})
    assert not objectives.run(objectives.make_job(table, "crd", 0, tmp_path), -math.inf)


@pytest.mark.usefixtures("benchmark")
def test_the_noise_reward_tells_nothing_of_the_image():
    noise = importlib.import_module("noise").noise
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2000, 3, 8, 8, generator=generator)
    brightness, values = images.mean((1, 2, 3)), noise(images, [""] * 2000)
    assert values.std().item() == pytest.approx(12**-0.5, rel=0.05)
    assert abs(torch.corrcoef(torch.stack([brightness.double(), values]))[0, 1]) < 0.06


@pytest.mark.slow
def test_the_cost_of_rewards_is_measured(benchmark, tmp_path):
    small = "--repetitions 1 --images 120".split()
    benchmark("rewards", *small, "--output", str(tmp_path / "figures.json"))
    results = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert set(results["shares"]) >= {"scene_match", "clip_score"}


@pytest.mark.slow
def test_rows_are_counted_without_a_gpu(benchmark, capsys):
    benchmark("gpu", "--count", "h200", "--rows", "medium, null branch off", "medium, recomputed")
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    (less, *_), (more, *_) = ([float(cell.strip(" |")) for cell in row[1:]] for row in rows)
    # Recomputing the blocks costs more than the gradient of one branch that is left out saves.
    assert 0.5 < less < more < 2
