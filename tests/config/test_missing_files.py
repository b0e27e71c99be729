"""A file that does not exist, or holds something else, is answered by its key."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flowalign.bundled import CONFIGS
from tests.config.wrong import (
    examples,
    misspelt,
    refusal,
    resolved,
    SCENE,
    train_error,
)


@pytest.mark.parametrize(
    ("file", "key", "value", "nearest"),
    [
        ("nft", "data.prompts", "assets/prompts/trian.jsonl", "train.jsonl"),
        ("nft", "evaluation.prompts", "assets/prompts/evaluatoin.jsonl", "evaluation.jsonl"),
        ("dpo", "data.pairs", "assets/pairs/trein.parquet", "train.parquet"),
        ("nft", "model.path", "assets/tiny-sd", "tiny-sd3"),
        ("dpo", "evaluation.pairs", "assets/pairs/evaluatoin.parquet", "evaluation.parquet"),
        ("nft", "data.prompts", "assets", ".jsonl"),
        ("nft", "data.prompts", "assets/prompts", ".jsonl"),
        ("nft", "data.prompts", "a" * 300 + ".txt", ""),
        ("nft", "model.path", "a" * 300, ""),
        ("dpo", "data.pairs", "a" * 300 + ".jsonl", ""),
        ("nft", "data.prompts", "nowhere/prompts.txt", ""),
        ("dpo", "data.pairs", "nowhere", ""),
        ("nft", "model.path", "./nowhere", ""),
        ("nft", "model.path", "assets/prompts", "model_index.json"),
    ],
)
def test_a_file_that_is_not_there_is_answered_with_the_nearest(
    file, key, value, nearest, monkeypatch
):
    monkeypatch.chdir(CONFIGS.parent)
    message = refusal(
        resolved(CONFIGS / "tiny" / f"{file}.yaml"),
        f"{key}={value}",
        "evaluation.rewards={scene_match: 1}",
    )
    assert all(part in message for part in (key, value, nearest))


@pytest.mark.parametrize(
    ("key", "name", "content"),
    [
        ("data.prompts", "p.txt", b" \n"),
        ("data.prompts", "p.txt", b"\xff\xfea\0"),
        ("data.prompts", "p.jsonl", b'{"prompt": 3}'),
        ("data.prompts", "p.jsonl", b'{"text": "a"}'),
        ("data.prompts", "p.jsonl", b'{"prompt": "a"'),
        ("data.prompts", "p.jsonl", b"[" * 100_000),
        ("data.pairs", "p.jsonl", b'{"prompt": "a"}'),
        ("data.pairs", "p.jsonl", b'{"prompt": "a", "image": "nowhere.png"}'),
        ("data.pairs", "p.jsonl", b'{"prompt": "a", "image": "a\\u0000b"}'),
        ("data.pairs", "p.jsonl", b'{"prompt": "a", "image": "%s"}' % (b"a" * 300)),
        ("data.pairs", "p.parquet", b"PAR1"),
        ("data.pairs", "p.png", b"\x89PNG"),
    ],
)
def test_a_file_with_something_else_in_it_is_refused_by_its_key(
    key, name, content, tmp_path, monkeypatch
):
    monkeypatch.chdir(CONFIGS.parent)
    (tmp_path / name).write_bytes(content)
    raw = resolved(CONFIGS / "tiny" / ("nft.yaml" if key == "data.prompts" else "sft.yaml"))
    message = refusal(raw, f"{key}={tmp_path / name}")
    assert message.rpartition(f"{key}: ")[2].startswith(str(tmp_path / name))


@examples(20)
@given(
    data=st.data(),
    name=st.sampled_from(["base/tiny-sd3.yaml", "tiny/nft.yaml", "sd3/pickscore.yaml"]),
)
def test_a_parent_that_is_not_there_is_answered_with_the_nearest(data, name):
    folder, _, file = name.partition("/")
    wrong = data.draw(misspelt(file.removesuffix(".yaml"))) + ".yaml"
    assume(not (CONFIGS / folder / wrong).exists())
    message = refusal({"extends": f"{folder}/{wrong}"})
    assert f"extends: there is no file {folder}/{wrong}" in message
    assert "Did you mean" in message


@pytest.mark.parametrize(
    "parent", [3, ["base/tiny-sd3.yaml"], None, True, "", "base", "a" * 300, "a\0b"]
)
def test_a_parent_that_is_not_a_file_is_refused(parent):
    assert "extends" in refusal({"extends": parent})


def test_a_file_to_train_by_that_is_not_there_is_answered_with_the_nearest():
    assert "Did you mean 'crd.yaml'?" in train_error(CONFIGS / "tiny" / "cdr.yaml")


@pytest.mark.parametrize(
    "spec", ["nowhere.py:redness", "no.module:redness", "flowalign.rewards.scene:scene_macth"]
)
@pytest.mark.parametrize("key", ["rewards", "evaluation.rewards"])
def test_a_reward_that_is_not_there_is_refused_by_its_key(spec, key):
    raw = resolved(CONFIGS / "tiny" / "nft.yaml")
    assert f"{key}.{spec}" in refusal(raw | SCENE, f"{key}={{'{spec}': 1.0}}")
