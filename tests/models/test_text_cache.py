"""Prompts are encoded once, and the cache of their embeddings has a bound."""

import contextlib

import torch

from flowalign.models import load_model
from flowalign.models.base import ENCODE_AT_ONCE
from flowalign.models.text_cache import TextCache
from tests.tiny import sd3_config

ROW_BYTES = 4 * 10


class Encoder:
    """Encodes a text as ten numbers and remembers what it was asked for."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, texts: list[str]):
        self.texts += texts
        return [(text, {"embeds": torch.full((10,), float(len(text)))}) for text in texts]


def test_a_text_is_encoded_once_together_with_the_empty_one():
    cache, encode = TextCache(), Encoder()
    rows = cache.rows(["abc", "a", "abc"], encode)
    assert {text: row["embeds"][0].item() for text, row in rows.items()} == {
        "": 0,
        "abc": 3,
        "a": 1,
    }
    cache.rows(["a", "ab"], encode)
    assert encode.texts == ["", "abc", "a", "ab"]


def test_the_least_recently_used_text_leaves_first_and_the_empty_one_stays():
    cache, encode = TextCache(max_bytes=3 * ROW_BYTES), Encoder()
    cache.rows(["a", "b"], encode)
    cache.rows(["a"], encode)
    cache.rows(["c"], encode)
    assert encode.texts == ["", "a", "b", "c"]
    cache.rows(["a"], encode)
    assert encode.texts == ["", "a", "b", "c"]
    cache.rows(["b"], encode)
    assert encode.texts == ["", "a", "b", "c", "b"]


def test_more_texts_than_fit_are_all_returned():
    cache, encode = TextCache(max_bytes=2 * ROW_BYTES), Encoder()
    assert set(cache.rows([str(n) for n in range(5)], encode)) == {"", *"01234"}


def test_a_cache_that_is_too_small_still_holds_a_text_and_the_empty_one():
    assert TextCache(max_bytes=1).capacity({"embeds": torch.zeros(10)}) == 2


def test_texts_are_encoded_in_chunks_during_one_visit_to_the_device(monkeypatch):
    model, chunks, visits = load_model(sd3_config()), [], []
    encode = model.encode_texts

    @contextlib.contextmanager
    def visit():
        visits.append("begin")
        yield
        visits.append("end")

    monkeypatch.setattr(model, "text_encoders_on_device", visit)
    monkeypatch.setattr(
        model, "encode_texts", lambda texts: chunks.append(len(texts)) or encode(texts)
    )
    model._texts.rows([""], model._encode_missing)
    model.remember([f"{n} circles" for n in range(ENCODE_AT_ONCE + 3)])
    assert chunks == [1, ENCODE_AT_ONCE, 3]
    assert visits == ["begin", "end"] * 2
    model.encode(["2 circles", "66 circles"])
    assert len(chunks) == 3


def test_no_more_prompts_are_remembered_than_fit():
    model = load_model(sd3_config())
    row = model._texts.rows([], model._encode_missing)[""]
    model._texts.max_bytes = 3 * sum(tensor.nbytes for tensor in row.values())
    encoded, encode = [], model.encode_texts
    model.encode_texts = lambda texts: encoded.extend(texts) or encode(texts)
    model.remember(["a circle", "a square", "a dot", "a star"])
    assert encoded == ["a circle", "a square"]
