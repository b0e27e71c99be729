"""Records of runs that no model made, for tests of pages."""

import torch

from flowalign.data.prompts import Prompt
from flowalign.evaluation.results import EvaluationResult
from flowalign.evaluation.thumbnails import make_thumbnail
from flowalign.reporting.record import RunRecord

PROMPTS = [
    Prompt("a circle", {"tag": "one"}),
    Prompt("two squares", {"tag": "two"}),
    Prompt("a dog", {"tag": "one"}),
]
BEFORE, AFTER = (0.25, 0.5, 0.75), (0.5, 0.25, 0.75)
"""The score of each prompt: the first gains, the second loses, the third stays."""


def result(scores, name="scene_match", side=32, level=0, **changes):
    """An evaluation of one image per prompt, which shows its level as a grey."""
    count = len(scores)
    picture = torch.full((3, side, side), level, dtype=torch.uint8)
    return EvaluationResult(
        prompt=torch.arange(count),
        rewards={name: torch.tensor(scores)},
        images=torch.zeros(0, 3, 8, 8).byte(),
        shown=torch.zeros(0).long(),
        thumbnails={row: make_thumbnail(picture, count) for row in range(count)},
        **changes,
    )


def metrics(steps, axis=8):
    """Lines of `metrics.jsonl`."""
    return [
        {"step": n, "images": axis * n, "reward/combined": 0.1 * n, "loss": 1.0 / n}
        for n in range(1, steps + 1)
    ]


def record(name="scene_match", run="my run", **changes):
    """A run of two steps on three prompts."""
    before = result(BEFORE, name, level=40)
    after = result(AFTER, name, level=200)
    values = {
        "name": run,
        "objective": "crd",
        "model": "assets/tiny-sd3",
        "config": "train: {steps: 2}\n",
        "metrics": metrics(2),
        "metrics_before": before.metrics,
        "prompts": PROMPTS,
        "before": before,
        "after": after,
        "steps": {2: after},
    }
    return RunRecord(**{**values, **changes})


def summary(name="scene_match", **changes):
    scores = {
        "before": {name: 0.25},
        "after": {name: 0.75},
        "difference": {name: (0.4, 0.5, 0.6)},
    }
    scores |= {"baseline_guided": None, "prompts": 43, "held_out": 0}
    end = {"stopped": "finished", "step": 100, "chosen_by": "", "better_step": None}
    return {**scores, "images": 14400, "seconds": 90.0, **end, **changes}


def guided_summary(name="scene_match", guidance=3.0):
    """A base at a guidance of its own, beside a policy that samples without guidance."""
    return {
        "guidance": guidance,
        "own_guidance": 1.0,
        "setting": "guidance",
        "chosen_by": name,
        "chosen_on": 43,
        "sweep": {"1": 0.25, "7": 0.3, "3": 0.35},
        "means": {name: 0.375},
        "difference": {name: (0.25, 0.375, 0.5)},
    }
