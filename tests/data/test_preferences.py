"""Preference data on disk: the formats that are read, and the errors for others."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from flowalign.config.load import load_config
from flowalign.data.examples import Example
from flowalign.data.preferences import check_pictures, PAIRS, PICTURES, read_examples, Reading
from flowalign.errors import UserError
from flowalign.reporting.console import shown
from flowalign.training.trainer import train
from tests.data.image_files import plain
from tests.tiny import ROOT

COLORS = {"a": "red", "b": "blue", "c": "green"}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with the images a, b and c; nothing is cached outside it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("FLOWALIGN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pictures").mkdir()
    for name, color in COLORS.items():
        (tmp_path / "pictures" / f"{name}.png").write_bytes(plain(color))
    return tmp_path / "pictures"


def write_lines(folder: Path, *lines: Any, name: str = "pairs.jsonl") -> str:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / name).write_text(text)
    return str(folder / name)


def color_of(read: Any) -> str:
    pixel = Image.open(io.BytesIO(read())).convert("RGB").getpixel((4, 4))
    return min(
        ("red", "green", "blue"),
        key=lambda name: sum(abs(a - b) for a, b in zip(pixel, rgb(name), strict=True)),
    )


def rgb(color: str) -> tuple[int, ...]:
    return Image.new("RGB", (1, 1), color).getpixel((0, 0))


def colors(examples: list[Example]) -> list[tuple[str, str, str | None]]:
    return [
        (e.prompt.text, color_of(e.chosen), color_of(e.rejected) if e.rejected else None)
        for e in examples
    ]


def refusal(path: str | Path, reading: Reading = PAIRS) -> str:
    with pytest.raises(UserError) as caught:
        read_examples(str(path), "data.pairs", reading)
    return str(caught.value)


@pytest.mark.parametrize(
    ("better", "worse"), [("chosen", "rejected"), ("chosen_file_name", "rejected_file_name")]
)
def test_a_file_names_the_images_of_its_pairs(folder, better, worse):
    path = write_lines(
        folder,
        {"prompt": "one", better: "a.png", worse: "b.png"},
        "",
        {"prompt": "two", better: "c.png", worse: "a.png"},
    )
    assert colors(read_examples(path, "data.pairs", PAIRS)) == [
        ("one", "red", "blue"),
        ("two", "green", "red"),
    ]


def test_images_are_found_in_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    (folder / "lists").mkdir()
    entry = {"prompt": "one", "chosen": "~/a.png", "rejected": "../b.png"}
    path = write_lines(folder / "lists", entry)
    assert colors(read_examples(path, "data.pairs", PAIRS)) == [("one", "red", "blue")]


def test_a_folder_is_read_through_its_metadata(folder):
    write_lines(
        folder,
        {"prompt": "one", "file_name": "a.png"},
        {"prompt": "two", "image": "b.png"},
        name="metadata.jsonl",
    )
    assert colors(read_examples(str(folder), "data.pairs", PICTURES)) == [
        ("one", "red", None),
        ("two", "blue", None),
    ]


def test_the_gap_is_the_difference_of_the_scores_or_1_without_scores(folder):
    pair = {"prompt": "one", "chosen": "a.png", "rejected": "b.png"}
    path = write_lines(folder, pair, {**pair, "score_chosen": 0.75, "score_rejected": 0.25})
    assert [example.gap for example in read_examples(path, "data.pairs", PAIRS)] == [1.0, 0.5]


def test_ties_are_left_out_of_pairs_but_kept_as_examples(folder):
    pair = {"prompt": "one", "chosen": "a.png", "rejected": "b.png"}
    path = write_lines(
        folder, {**pair, "score_chosen": 0.5, "score_rejected": 0.5}, {**pair, "prompt": "two"}
    )
    assert [example.prompt.text for example in read_examples(path, "data.pairs", PAIRS)] == ["two"]
    assert [example.prompt.text for example in read_examples(path, "data.pairs", PICTURES)] == [
        "one",
        "two",
    ]


ROWS = {
    "caption": ["one", "two", "tie", "unlabelled"],
    "jpg_0": ["a", "b", "a", "a"],
    "jpg_1": ["b", "c", "b", "b"],
    "label_0": [1.0, 0.0, 0.5, None],
}


def pick_a_pic(folder: Path, as_images: bool = False, **changes: Any) -> datasets.Dataset:
    rows = {name: values for name, values in {**ROWS, **changes}.items() if values}
    for side in ("jpg_0", "jpg_1"):
        if side in rows:
            rows[side] = [(folder / f"{name}.png").read_bytes() for name in rows[side]]
    table = datasets.Dataset.from_dict(rows)
    if as_images:
        for side in ("jpg_0", "jpg_1"):
            table = table.cast_column(side, datasets.Image())
    return table


@pytest.mark.parametrize("as_images", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "folder of parquet", "saved"])
def test_pick_a_pic_columns_become_pairs_without_ties(folder, kind, as_images):
    table, location = pick_a_pic(folder, as_images), folder / "data"
    if kind == "saved":
        table.save_to_disk(location)
    else:
        location.mkdir()
        table.to_parquet(location / "train.parquet")
        location = location / "train.parquet" if kind == "parquet" else location
    assert colors(read_examples(str(location), "data.pairs", PAIRS)) == [
        ("one", "red", "blue"),
        ("two", "green", "blue"),
    ]


def test_examples_take_the_chosen_image_of_a_pair(folder):
    path = write_lines(
        folder,
        {"prompt": "one", "chosen": "a.png", "rejected": "b.png"},
        {"prompt": "two", "image": "c.png"},
    )
    assert [
        color_of(example.chosen) for example in read_examples(path, "data.pairs", PICTURES)
    ] == ["red", "green"]


PAIR = {"prompt": "one", "chosen": "a.png", "rejected": "b.png"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            {"chosen": "a.png", "rejected": "b.png"},
            'line 2 does not name a prompt and an image. Write {"prompt"',
        ),
        (
            {"prompt": 3, "chosen": "a.png", "rejected": "b.png"},
            'line 2 does not name a prompt and an image. Write {"prompt"',
        ),
        (
            {"prompt": "one", "rejected": "b.png"},
            'line 2 does not name a prompt and an image. Write {"prompt"',
        ),
        ([1, 2], 'line 2 does not name a prompt and an image. Write {"prompt"'),
        ({**PAIR, "rejected": "nowhere.png"}, "line 2: the image"),
        ({**PAIR, "chosen": "nowhere.png"}, "line 2: the image"),
        ("{", "line 2 is not JSON"),
    ],
)
def test_a_line_without_a_pair_is_an_error_with_file_and_line(folder, line, message):
    path = write_lines(folder, PAIR, line)
    assert f"data.pairs: {path}, {message}" in refusal(path)


@pytest.mark.parametrize(
    "scores", [{"score_chosen": "high", "score_rejected": 0.1}, {"score_chosen": None}]
)
def test_a_wrong_score_is_an_error_with_file_and_line(folder, scores):
    path = write_lines(folder, PAIR, {**PAIR, **scores})
    assert f"data.pairs: {path}, line 2 has score_chosen" in refusal(path)


def test_a_single_image_is_an_error_where_pairs_are_needed(folder):
    path = write_lines(folder, PAIR, {"prompt": "two", "image": "a.png"})
    assert refusal(path).startswith(f"data.pairs: {path}, entry 2 has a single image, but")


def test_a_missing_file_is_named(folder):
    message = f"data.pairs: there is no file or folder {folder}/nowhere. Correct the path."
    assert refusal(folder / "nowhere") == message


def test_an_empty_file_is_an_error(folder):
    assert "has no pairs" in refusal(write_lines(folder, ""))


def test_missing_columns_are_named_with_the_present_ones(folder):
    pick_a_pic(folder, label_0=None, jpg_1=None).to_parquet(folder / "train.parquet")
    message = refusal(folder / "train.parquet")
    assert "has no column jpg_1, label_0; it has caption, jpg_0" in message


def test_data_that_holds_only_ties_is_an_error(folder):
    pick_a_pic(folder, label_0=[0.5] * 4).to_parquet(folder / "train.parquet")
    assert "Ties are left out" in refusal(folder / "train.parquet")


@pytest.mark.parametrize("name", ["notes.txt", "empty folder", "splits"])
def test_another_format_is_an_error_that_lists_the_formats(folder, name):
    location = folder / name
    if name == "notes.txt":
        location.write_text("hello")
    elif name == "empty folder":
        location.mkdir()
    else:
        datasets.DatasetDict({"train": pick_a_pic(folder)}).save_to_disk(location)
    message = refusal(location)
    assert f"data.pairs: {location} cannot be opened as a dataset" in message
    assert "Use a .jsonl file, a folder with metadata.jsonl, parquet files" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption": ["one", None, "tie", "unlabelled"]}, "row 2 has the caption None. Write a"),
        ({"label_0": [1.0, 2.0, 0.5, None]}, "row 2 has label_0 2.0. Write 1 if jpg_0 is better"),
        ({"label_0": ["jpg_0"] * 4}, "row 1 has label_0 'jpg_0'. Write 1 if jpg_0 is better"),
        ({"label_0": [[1.0]] * 4}, "row 1 has label_0 [1.0]. Write 1 if jpg_0 is better"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(folder, changes, message):
    pick_a_pic(folder, **changes).to_parquet(folder / "train.parquet")
    assert f"data.pairs: {folder}, {message}" in refusal(folder)


def test_rows_without_a_winner_may_lack_a_caption(folder):
    table = pick_a_pic(
        folder, caption=["one", "two", None, None], label_0=[1.0, 0.0, 0.5, math.nan]
    )
    table.to_parquet(folder / "train.parquet")
    assert len(read_examples(str(folder), "data.pairs", PAIRS)) == 2


CELLS = [
    ([plain("red"), None], "jpg_0 holds None"),
    ([1, 2], "jpg_0 holds 1"),
    ([{"bytes": None, "path": "a.png"}] * 2, "jpg_0 holds no bytes"),
    ([plain("red"), b"text"], "cannot be opened as an image"),
    ([plain("red"), plain("red")[:40]], "cannot be opened as an image"),
]


@pytest.mark.parametrize(("cells", "message"), CELLS)
def test_a_cell_without_an_image_is_named_by_its_row(folder, cells, message):
    other = [plain("blue")] * 2
    rows = {"caption": ["one", "two"], "jpg_0": cells, "jpg_1": other, "label_0": [1.0, 0.0]}
    datasets.Dataset.from_dict(rows).to_parquet(folder / "train.parquet")
    examples = read_examples(str(folder), "data.pairs", PAIRS)
    with pytest.raises(UserError) as caught:
        check_pictures(examples)
    row = 1 if cells[0] != plain("red") else 2
    assert f"data.pairs: {folder}, row {row}" in str(caught.value)
    assert message in str(caught.value)


def test_every_image_is_opened_once(folder):
    path = write_lines(folder, *[PAIR] * 300, {"prompt": "two", "image": "c.png"})
    opened = []
    examples = [
        replace(
            example,
            chosen=lambda read=example.chosen: opened.append(1) or read(),
            rejected=example.rejected
            and (lambda read=example.rejected: opened.append(1) or read()),
        )
        for example in read_examples(path, "data.pairs", PICTURES)
    ]
    check_pictures(examples)
    assert len(opened) == 601


def test_a_run_without_pictures_shows_no_progress_of_them(capsys):
    with shown():
        check_pictures([])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("fault", [b"text", plain("red")[:40], None])
def test_the_first_image_that_cannot_be_opened_is_named(folder, fault):
    lines = [PAIR] * 10 + [{**PAIR, "rejected": "c.png"}] * 10
    path = write_lines(folder, *lines)
    examples = read_examples(path, "data.pairs", PAIRS)
    if fault is None:
        (folder / "c.png").unlink()
    else:
        (folder / "c.png").write_bytes(fault)
    with pytest.raises(UserError, match=rf"^data\.pairs: {path}, line 11"):
        check_pictures(examples)


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet"),
        ("validation-00000-of-00001.parquet", "validation_unique-00000-of-00001.parquet"),
        ("train/0.parquet", "test/0.parquet"),
        ("train.parquet", "more.parquet"),
        ("train.parquet", "val_0.parquet"),
    ],
)
def test_a_folder_with_several_splits_is_refused(folder, names):
    location = write_files(folder, names)
    message = refusal(location)
    assert f"data.pairs: {location} holds files of several splits, such as" in message
    assert all(name in message for name in names)
    assert "move the files of one split into a folder of their own" in message


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00002.parquet", "train-00001-of-00002-abc.parquet"),
        ("train/0.parquet", "train/1.parquet"),
        ("a.parquet", "contest.parquet"),
        ("eval-00000-of-00002.parquet", "eval-00001-of-00002.parquet"),
    ],
)
def test_a_folder_with_the_files_of_one_split_is_read_whole(folder, names):
    assert len(read_examples(str(write_files(folder, names)), "data.pairs", PAIRS)) == 4


def write_files(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        (folder / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        pick_a_pic(folder).to_parquet(folder / "data" / name)
    return folder / "data"


@pytest.mark.parametrize("role", ["chosen", "rejected"])
def test_a_file_that_is_not_an_image_is_named_before_training(role, folder, tmp_path):
    (folder / "b.png").write_bytes(b"text")
    pair = {"prompt": "a red circle", "chosen": "a.png", "rejected": "c.png"}
    path = write_lines(folder, pair, {**pair, role: "b.png"})
    overrides = [
        f"data.pairs={path}",
        f"evaluation.pairs={path}",
        "train.prompts_per_step=2",
        "train.images_per_pass=2",
    ]
    config = load_config(
        ROOT / "configs" / "tiny" / "dpo.yaml", [*overrides, f"output={tmp_path}/run"]
    )
    message = rf"^(data|evaluation)\.pairs: {path}, line 2 cannot be opened as an image"
    with pytest.raises(UserError, match=message):
        train(config)
    assert not (tmp_path / "run").exists()
