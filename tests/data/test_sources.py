"""Prompts and pairs from data sets: splits, columns, known layouts, and the hub out of reach."""

import json
from pathlib import Path

import datasets
import pytest

from flowalign.config.load import load_config
from flowalign.data.preferences import PAIRS, read_examples
from flowalign.data.prompts import Prompt, read_prompts
from flowalign.errors import UserError
from tests.data.image_files import plain

PROMPTS = [Prompt("a red circle", {"count": 1}), Prompt('two "blue", squares', {"count": 2})]
RED, BLUE = plain("red"), plain("blue")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def repository(tmp_path) -> str:
    """A folder in the layout of a repository of the hub: two splits in parquet files."""
    for split in ("train", "test"):
        rows = {"caption": [f"{split} {p.text}" for p in PROMPTS], "count": [1, 2]}
        table = datasets.Dataset.from_dict({**rows, "image": [RED, RED]})
        table.to_parquet(tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet")
    (tmp_path / "set" / "README.md").write_text("---\nlicense: mit\n---\n")
    return str(tmp_path / "set")


def test_a_split_has_the_prompts_of_its_files_without_pictures(repository):
    written = {"path": repository, "split": "test"}
    assert read_prompts(written) == [Prompt(f"test {p.text}", p.metadata) for p in PROMPTS]
    with pytest.raises(UserError, match=r"has no split|Unknown split|cannot be opened as a data"):
        read_prompts({"path": repository, "split": "validation"})


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.tsv", "p.parquet", "set"])
def test_every_format_gives_the_same_prompts_under_names_of_columns(tmp_path, name):
    rows = [{"title": p.text, "n": p.metadata["count"], "prompt": "wrong"} for p in PROMPTS]
    table, file = datasets.Dataset.from_list(rows), tmp_path / name
    written = {"path": str(file), "columns": {"prompt": "title", "count": "n"}}
    if name == "p.jsonl":
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif name == "p.parquet":
        table.to_parquet(file)
    elif name == "set":
        table.to_parquet(file / "train.parquet")
        written["split"] = "train"
    else:
        table.to_csv(file, index=False, sep="," if name == "p.csv" else "\t")
    assert read_prompts(written) == PROMPTS


@pytest.mark.parametrize("text", ["count,prompt\n1,a\n2,\n", 'count,prompt\n1,a\n2,"  "\n'])
def test_an_empty_prompt_is_refused_with_file_and_row(tmp_path, text):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(UserError, match=r"^data\.prompts: .*p\.csv, row 2 has no prompt in the"):
        read_prompts(tmp_path / "p.csv")


def test_a_column_that_does_not_exist_is_answered_with_those_that_do(repository):
    written = {"path": repository, "split": "train", "columns": {"prompt": "captoin"}}
    message = r"data\.prompts\.columns\.prompt is captoin, but .* has the columns caption, count"
    with pytest.raises(UserError, match=message):
        read_prompts(written)


@pytest.mark.parametrize("read", [read_prompts, lambda w, k: read_examples(w, k, PAIRS)])
def test_a_data_set_that_cannot_be_reached_is_refused_with_what_to_do(read, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = r"^data\.pairs: there is no file or folder nobody/nothing, and the hub cannot be"
    with pytest.raises(UserError, match=message) as error:
        read("nobody/nothing", "data.pairs")
    assert "Give a local file or folder" in str(error.value)


@pytest.mark.parametrize(
    ("name", "phrase"),
    [("GatedRepoError", "hf auth login"), ("DatasetNotFoundError", "Check the spelling")],
)
def test_a_private_or_missing_data_set_is_refused_with_what_to_do(name, phrase, monkeypatch):
    def fail(*_, **__):
        raise type(name, (Exception,), {})("refused")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=phrase):
        read_prompts({"path": "nobody/nothing", "split": "train"})


KNOWN = {
    "pick-a-pic": {
        "caption": ["a", "b", "c"],
        "jpg_0": [RED, BLUE, RED],
        "jpg_1": [BLUE, RED, BLUE],
        "label_0": [1.0, 0.0, 0.5],
    },
    "rapidata": {
        "prompt": ["a", "b", "c"],
        "image1": [RED, BLUE, RED],
        "image2": [BLUE, RED, BLUE],
        "weighted_results_image1_preference": [0.75, 0.25, 0.5],
        "weighted_results_image2_preference": [0.25, 0.75, 0.5],
    },
    "image-reward": {
        "prompt_id": ["x", "y", "x", "y", "y"],
        "prompt": ["a", "b", "a", "b", "b"],
        "image": [BLUE, RED, RED, BLUE, BLUE],
        "rank": [2, 1, 1, 3, 3],
    },
    "named": {"prompt": ["a", "b"], "chosen": [RED, RED], "rejected": [BLUE, BLUE]},
}
SCORES = {
    "pick-a-pic": [("a", 1.0), ("b", 1.0)],
    "rapidata": [("a", 0.5), ("b", 0.5)],
    "image-reward": [("a", 1.0), ("b", 1.0), ("b", 1.0)],
    "named": [("a", 1.0), ("b", 1.0)],
}


@pytest.mark.parametrize("name", KNOWN)
def test_columns_of_known_data_sets_are_recognised(tmp_path, name):
    datasets.Dataset.from_dict(KNOWN[name]).to_parquet(tmp_path / "train.parquet")
    examples = read_examples({"path": str(tmp_path), "split": "train"}, "data.pairs", PAIRS)
    assert [(e.prompt.text, e.gap) for e in examples] == SCORES[name]
    assert {e.chosen() for e in examples} == {RED}
    assert {e.rejected() for e in examples if e.rejected} == {BLUE}


def test_pairs_of_other_columns_are_named(tmp_path):
    rows = {"text": ["a"], "better": [RED], "worse": [BLUE]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "p.parquet")
    columns = {"prompt": "text", "chosen": "better", "rejected": "worse"}
    written = {"path": str(tmp_path / "p.parquet"), "columns": columns}
    (example,) = read_examples(written, "data.pairs", PAIRS)
    assert (example.prompt.text, example.chosen()) == ("a", RED)


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.tsv", "hpdv3.json"])
def test_files_that_name_pictures_are_relative_to_the_file(tmp_path, name):
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "1.png").write_bytes(RED)
    (folder / "images" / "2.png").write_bytes(BLUE)
    rows = [["prompt", "chosen", "rejected"], ["a, b", "images/1.png", "images/2.png"]]
    if name == "hpdv3.json":
        pair = {"prompt": "a, b", "path1": "images/1.png", "path2": "images/2.png"}
        (folder / name).write_text(json.dumps([{**pair, "confidence": 0.9}]))
    else:
        separator = "," if name.endswith("csv") else "\t"
        lines = [separator.join(f'"{cell}"' for cell in row) for row in rows]
        (folder / name).write_text("\n".join(lines))
    (example,) = read_examples(str(folder / name), "data.pairs", PAIRS)
    assert example.rejected is not None
    assert (example.prompt.text, example.chosen(), example.rejected()) == ("a, b", RED, BLUE)


def test_a_file_with_details_is_located_and_its_keys_are_checked(tmp_path, monkeypatch):
    (tmp_path / "prompts.csv").write_text("caption\na red circle\n")
    file = tmp_path / "run.yaml"
    file.write_text("extends: tiny/crd.yaml\ndata: {prompts: {path: prompts.csv}}\n")
    monkeypatch.chdir(Path(__file__).parent)
    assert load_config(file).data.prompts == {"path": str(tmp_path / "prompts.csv")}
    with pytest.raises(UserError, match=r"Key data\.prompts\.splt.*Did you mean 'split'"):
        load_config(file, ["data.prompts.splt=train"])
    with pytest.raises(UserError, match=r"data\.prompts is 3; it must be text"):
        load_config(file, ["data.prompts=3"])
