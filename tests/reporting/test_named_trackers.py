"""The section `tracking`: libraries offline, a tracker of a user, resuming, and failures."""

import json
import math
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flowalign import distributed
from flowalign.config.load import load_config
from flowalign.errors import UserError
from flowalign.reporting.trackers import open_trackers
from flowalign.tracking import TRACKERS
from flowalign.tracking.base import Tracker
from flowalign.tracking.registry import checked_tracking, load_trackers

CAPTIONS = ["a red: circle/é", "b"]
PICTURES = torch.stack([torch.zeros(3, 16, 16), torch.full((3, 16, 16), 200)]).byte()
SETTINGS = {"train": {"steps": 3, "stop": {}}, "model": {"merge": ["a"], "dtype": None}}
OWN = """
import flowalign

class Lines(flowalign.Tracker):
    def __init__(self, file: str = "lines.txt"):
        self.file = file

    def start(self, run):
        self.path = run.folder / self.file
        self.add("start", run.id, run.is_resumed, run.settings["train"]["steps"])

    def log(self, step, metrics):
        self.add("log", step)

    def images(self, step, name, images, captions):
        self.add("images", step, *captions)

    def add(self, *values):
        with self.path.open("a") as file:
            print(*values, file=file)
"""


class Broken(Tracker):
    """A tracker whose network is down."""

    def __init__(self):
        self.calls = 0

    def log(self, step, metrics):
        self.calls += 1
        raise ConnectionError("no route to host")


def record(folder: Path, resume_at: int, steps: range, trackers: dict[str, Tracker]) -> None:
    """Log some steps, with pictures in the last of them."""
    distributed.state()  # accelerate's trackers ask it which process this is
    with open_trackers(folder, resume_at, SETTINGS, trackers) as opened:
        for step in steps:
            if step == steps[-1]:
                opened.images(step, "pictures", PICTURES, CAPTIONS)
            opened.log(step, {"step": step, "reward/a": step / 2, "loss": math.nan})


def record_twice(folder: Path, name: str) -> None:
    """Log three steps, resume after the second, and log two: the third is a repetition."""
    section = checked_tracking({name: {"project": "shapes"}})
    record(folder, 0, range(1, 4), load_trackers(section))
    # The offline folder of a run is named by the second in which it was opened.
    time.sleep(1.1)
    record(folder, 2, range(3, 5), load_trackers(section))


def wandb_records(content: bytes) -> Iterator[bytes]:
    """The records of an offline file: 7 bytes of head, then blocks of the format of LevelDB's log.

    A record has a checksum of 4 bytes, its length in 2, its kind in 1 (1: whole, 4: the last part).
    """
    position, record = 7, b""
    while position + 7 <= len(content):
        room = 32768 - position % 32768
        if room < 7:
            position += room
        size, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        record += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):
            yield record
            record = b""


def test_wandb_offline_holds_metrics_and_captioned_pictures_of_one_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    record_twice(tmp_path, "wandb")
    rewards, captions, ids, settings = [], [], set(), {}
    for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        for data in wandb_records(file.read_bytes()):
            entry = Record.FromString(data)
            ids |= {entry.run.run_id} - {""}
            settings |= {item.key: item.value_json for item in entry.config.update}
            for item in entry.history.item:
                key, value = item.key or "/".join(item.nested_key), json.loads(item.value_json)
                rewards += [value] if key == "reward/a" else []
                captions += value if key == "pictures/captions" else []
    assert rewards == [0.5, 1.0, 1.5, 2.0]
    assert captions == CAPTIONS * 2
    assert ids == set(json.loads((tmp_path / "tracking.json").read_text()).values())
    assert settings["train.steps"] == "3"
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/*.png"))) == 4


def test_mlflow_holds_one_run_with_metrics_pictures_and_captions(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    # A folder, because the smaller package of MLflow lacks a database.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    mlflow.set_tracking_uri(None)
    record_twice(tmp_path, "mlflow")
    (run,) = mlflow.search_runs(experiment_names=["shapes"], output_format="list")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "reward/a")
    assert [(entry.step, entry.value) for entry in history] == [(1, 0.5), (2, 1), (3, 1.5), (4, 2)]
    assert run.data.params["train.steps"] == "3"
    (folder,) = tmp_path.glob("mlruns/*/*/artifacts")
    assert len(list(folder.glob("images/*.png"))) == 4
    assert list(json.loads((folder / "pictures/captions.json").read_text()).values()) == CAPTIONS


def test_trackio_holds_one_run_with_metrics_and_captioned_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    from trackio import sqlite_storage

    record_twice(tmp_path, "trackio")
    (run,) = trackio.Api().runs("shapes")
    rows = sqlite_storage.SQLiteStorage.get_logs("shapes", run.name)
    rewards = {row["step"]: row["reward/a"] for row in rows if "reward/a" in row}
    assert rewards == {1: 0.5, 2: 1, 3: 1.5, 4: 2}
    pictures = [row["pictures/00"] for row in rows if "pictures/00" in row]
    assert [picture["caption"] for picture in pictures] == CAPTIONS[:1] * 2


def test_swanlab_offline_holds_files_of_one_run_with_pictures(tmp_path):
    pytest.importorskip("swanlab")
    section = checked_tracking({"swanlab": {"mode": "offline"}})
    record(tmp_path, 0, range(1, 4), load_trackers(section))
    record(tmp_path, 2, range(3, 5), load_trackers(section))
    (name,) = json.loads((tmp_path / "tracking.json").read_text()).values()
    files = list(tmp_path.glob(f"swanlab/**/run-{name}.swanlab"))
    assert len(files) == 2
    assert all(b"reward/a" in file.read_bytes() for file in files)
    assert len(list(tmp_path.glob("swanlab/**/media/image/*.png"))) == 4


def test_a_users_tracker_gets_each_step_once_and_resumes_by_its_id(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    section = checked_tracking({f"{tmp_path}/mine.py:Lines": {"file": "own.txt"}})
    record(tmp_path, 0, range(1, 4), load_trackers(section))
    record(tmp_path, 2, range(3, 5), load_trackers(section))
    (name,) = json.loads((tmp_path / "tracking.json").read_text()).values()
    pictures = " ".join(CAPTIONS)
    assert (tmp_path / "own.txt").read_text().splitlines() == [
        *(f"start {name} False 3", "log 1", "log 2", f"images 3 {pictures}", "log 3"),
        *(f"start {name} True 3", f"images 4 {pictures}", "log 4"),
    ]


def test_a_run_that_begins_again_begins_another_record(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    section = checked_tracking([f"{tmp_path}/mine.py:Lines"])
    record(tmp_path, 0, range(1, 3), load_trackers(section))
    record(tmp_path, 0, range(1, 3), load_trackers(section))
    lines = (tmp_path / "lines.txt").read_text().splitlines()
    begins = [line.split() for line in lines if line.startswith("start")]
    assert [resumed for _, _, resumed, _ in begins] == ["False", "False"]
    assert begins[0][1] != begins[1][1]
    assert lines.count("log 1") == 2


def test_a_tracker_that_fails_is_said_once_and_the_others_record_every_step(tmp_path, capsys):
    broken = Broken()
    record(tmp_path, 0, range(1, 4), {"mine": broken})
    output = capsys.readouterr()
    assert (output.out + output.err).count("tracking.mine failed: ConnectionError: no route") == 1
    assert broken.calls == 1  # it rests, because a failure may take minutes
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_library_is_refused_with_what_to_install(name, monkeypatch):
    monkeypatch.setattr("flowalign.tracking.external.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"pip install 'flowalign\[{name}\]'"):
        load_trackers(checked_tracking(name))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("wandd", r"there is no 'wandd'.*Did you mean 'wandb'"),
        ({"wandb": {"projekt": "x"}}, r"Key tracking.wandb.projekt.*Did you mean 'project'"),
        ({"swanlab": {"mode": "cloud"}}, r"tracking.swanlab.mode is 'cloud'"),
        (3, r"tracking is 3. Write names"),
        ("json:dumps", "standard library"),
    ],
)
def test_a_wrong_name_or_setting_is_answered_with_the_right_one(section, message):
    with pytest.raises(UserError, match=message):
        checked_tracking(section)


def test_a_file_may_write_one_name_names_or_settings(tmp_path):
    parent = tmp_path / "parent.yaml"
    parent.write_text("extends: tiny/crd.yaml\ntracking: {mlflow: {project: a}}\n")
    child = tmp_path / "child.yaml"
    child.write_text(f"extends: {parent}\ntracking: [wandb, 'mine.py:Lines']\n")
    (tmp_path / "mine.py").write_text(OWN)
    assert load_config(parent).tracking == {"mlflow": {"project": "a"}}
    assert load_config(parent, ["tracking.mlflow.run_name=b"]).tracking == {
        "mlflow": {"project": "a", "run_name": "b"}
    }
    # A list replaces, and the file beside the YAML is located.
    assert load_config(child).tracking == {"wandb": {}, f"{tmp_path}/mine.py:Lines": {}}
    assert load_config(child, ["tracking=trackio"]).tracking == {"trackio": {}}
