"""Tensors on disk: found again, never damaged, and bounded."""

import os

import pytest
import torch

from flowalign.disk_cache import DiskCache
from flowalign.errors import UserError
from flowalign.models import load_model
from tests.tiny import random_sd35, sd3_config, TEXTS


def files(folder):
    return sorted(folder.rglob("*.safetensors"))


def test_tensors_belong_to_a_content_and_a_salt(tmp_path):
    cache = DiskCache("any", "one", tmp_path)
    cache.write(b"a", {"x": torch.arange(3)})
    assert torch.equal(DiskCache("any", "one", tmp_path).read(b"a")["x"], torch.arange(3))
    assert cache.read(b"b") is None
    assert DiskCache("any", "two", tmp_path).read(b"a") is None


def test_a_damaged_file_counts_as_missing(tmp_path):
    cache = DiskCache("any", "salt", tmp_path)
    cache.write(b"a", {"x": torch.arange(3)})
    (file,) = files(tmp_path)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert cache.read(b"a") is None


def test_what_was_not_used_for_the_longest_time_goes_first(tmp_path):
    cache = DiskCache("any", "salt", tmp_path, limit=10**9)
    for number, content in enumerate((b"a", b"b", b"c")):
        cache.write(content, {"x": torch.zeros(100)})
        os.utime(cache._file(content), (number, number))
    size = files(tmp_path)[0].stat().st_size
    assert cache.read(b"a")
    cache.limit = 2 * size
    cache.trim()
    assert cache.read(b"b") is None
    assert cache.read(b"a")
    assert cache.read(b"c")


def test_a_folder_that_cannot_be_written_is_an_error_of_the_user(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        DiskCache("any", "salt", tmp_path / "file")


def test_texts_are_encoded_once_for_all_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWALIGN_CACHE", str(tmp_path))
    encoded, rows = [], []
    for _ in range(2):
        model = load_model(sd3_config(text_cache_gb=1.0))
        encode = model.encode_texts
        model.encode_texts = lambda texts, encode=encode: encoded.append(texts) or encode(texts)
        model.remember(list(TEXTS))
        rows.append(model.encode(list(TEXTS)).inputs["embeds"])
    # Each alone, so that no row depends on which others were missing.
    assert sorted(encoded) == sorted([[""], *([text] for text in TEXTS)])
    assert torch.equal(*rows)


def test_embeddings_of_another_length_are_others(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWALIGN_CACHE", str(tmp_path / "cache"))
    model = random_sd35(tmp_path / "model")
    keys = set()
    for length in (8, 16):
        model.config.max_sequence_length = length
        keys.add(model.text_fingerprint())
    assert len(keys) == 2
