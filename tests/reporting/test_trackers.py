"""Trackers: what a run writes down, and what is dropped when it is resumed."""

import json
import math

import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flowalign.reporting.trackers import JsonLines, open_trackers, read_metrics, Trackers


class Recorder:
    """A tracker of a user."""

    def __init__(self):
        self.calls = []

    def log(self, step, metrics):
        self.calls.append(("log", step, dict(metrics)))

    def images(self, step, name, images, captions):
        self.calls.append(("images", step, name, tuple(images.shape), list(captions)))

    def close(self):
        self.calls.append(("close",))


def test_every_tracker_gets_metrics_and_pictures_and_is_closed():
    recorders = Recorder(), Recorder()
    with Trackers(recorders) as trackers:
        trackers.log(3, {"loss": 0.5})
        trackers.images(3, "pictures", torch.zeros(1, 3, 2, 2).byte(), ["a red circle"])
    expected = [
        ("log", 3, {"loss": 0.5}),
        ("images", 3, "pictures", (1, 3, 2, 2), ["a red circle"]),
        ("close",),
    ]
    assert [recorder.calls for recorder in recorders] == [expected, expected]


def test_a_line_has_its_step_first_and_null_for_what_is_not_finite(tmp_path):
    JsonLines(tmp_path, 0).log(1, {"images": 8, "loss": math.nan})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line == '{"step": 1, "images": 8, "loss": null}\n'


def test_lines_after_the_checkpoint_and_damaged_lines_are_dropped(tmp_path):
    lines = [json.dumps({"step": step, "loss": 0.1}) for step in (1, 2, 3)]
    text = "\n".join([lines[0], "[1]", '{"loss": 1}', lines[1], lines[2], '{"step": 4, "lo'])
    (tmp_path / "metrics.jsonl").write_text(text)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    JsonLines(tmp_path, step=2).log(3, {"loss": 0.2})
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [
        (1, 0.1),
        (2, 0.1),
        (3, 0.2),
    ]


def test_a_run_folder_without_metrics_has_none(tmp_path):
    assert read_metrics(tmp_path) == []


def test_pictures_are_saved_as_a_grid_and_sent_to_tensorboard(tmp_path):
    with open_trackers(tmp_path, 0, {"train": {"steps": 3}}) as trackers:
        trackers.log(100, {"step": 100, "reward/a": 1.0})
        trackers.images(100, "pictures", torch.full((7, 3, 8, 8), 255).byte(), ["a"] * 7)
    grid = Image.open(tmp_path / "pictures" / "step-000100.png")
    assert grid.size == (6 * 10 + 2, 2 * 10 + 2)
    (file,) = (tmp_path / "tensorboard").iterdir()
    events = EventAccumulator(str(file)).Reload()
    assert [scalar.value for scalar in events.Scalars("reward/a")] == [1.0]
    (picture,) = events.Images("pictures")
    assert (picture.step, picture.width) == (100, 8 + 6 * (128 + 8))
    begin = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"train.steps" in begin


def test_captions_that_no_font_has_become_a_text_in_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setattr("flowalign.reporting.images.font_for", lambda texts: None)
    with open_trackers(tmp_path, 0) as trackers:
        trackers.images(1, "pictures", torch.zeros(2, 3, 8, 8).byte(), ["ein Kreis", "b"])
    (file,) = (tmp_path / "tensorboard").iterdir()
    (text,) = EventAccumulator(str(file)).Reload().Tensors("pictures/text_summary")
    assert text.tensor_proto.string_val[0].decode() == "1  ein Kreis  \n2  b"
