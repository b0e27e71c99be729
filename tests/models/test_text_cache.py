"""Prompts are encoded once, and the cache of their embeddings has a bound."""

import contextlib
import math

import pytest
import torch
from torch import nn

from flowalign.models import load_model
from flowalign.models.pipeline import visiting
from flowalign.models.text_cache import ENCODE_AT_ONCE, RECENT, TextCache
from tests.tiny import sd3_config

ROW_BYTES = 4 * 10


class Encoder:
    """Encodes a text as ten numbers and records which texts it was given together."""

    def __init__(self) -> None:
        self.chunks: list[list[str]] = []

    def __call__(self, chunks):
        self.chunks += chunks
        texts = [text for chunk in chunks for text in chunk]
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
    assert encode.chunks == [[""], ["abc"], ["a"], ["ab"]]


def test_texts_in_advance_are_kept_if_all_fit_and_others_are_encoded_alone():
    cache, encode = TextCache(max_bytes=3 * ROW_BYTES), Encoder()
    cache.keep(["a", "b", "c"], encode)
    assert encode.chunks == [[""]]
    cache.keep(["a", "b", "a"], encode)
    assert encode.chunks[1:] == [["a", "b"]]
    cache.rows(["a", "c", "d"], encode)
    assert encode.chunks[2:] == [["c"], ["d"]]
    cache.keep(["e"], encode)
    cache.rows(["a", "b", "c"], encode)
    assert len(encode.chunks) == 4


def test_one_visit_encodes_the_texts_that_come_next_each_alone_as_many_as_fit():
    cache, encode = TextCache(max_bytes=(RECENT + 11) * ROW_BYTES), Visits()
    texts = [str(number) for number in range(1000)]
    steps = [texts[start : start + 5] for start in range(0, 1000, 5)]
    for step, wanted in enumerate(steps):
        later = (text for following in steps[step + 1 :] for text in following)
        assert set(cache.rows(wanted, encode, later)) == {"", *wanted}
    assert encode.chunks == [[""], *([text] for text in texts)]
    # Beside the empty prompt there is room for 74 others, which is 14 whole steps.
    assert RECENT == 64
    assert encode.visits == 1 + math.ceil(1000 / 70)
    assert len(cache._recent) == 74
    assert encode.most == 74


class Visits(Encoder):
    """An encoder that counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.visits = self.most = 0

    def __call__(self, chunks):
        self.visits += 1
        self.most = max(self.most, len(chunks))
        return super().__call__(chunks)


def test_no_more_rows_than_fit_are_held_at_any_time():
    cache, held = TextCache(max_bytes=(RECENT + 11) * ROW_BYTES), []

    class Watched(Encoder):
        def __call__(self, chunks):
            held.append(len(cache._kept) + len(cache._recent) + sum(map(len, chunks)))
            return super().__call__(chunks)

    encode = Watched()
    for start in range(0, 300, 3):
        texts = [str(number) for number in range(start, 300)]
        cache.rows(texts[:3], encode, texts[3:])
    cache.keep([f"kept {number}" for number in range(10)], encode)
    assert max(held[:-1]) == RECENT + 11
    assert len(cache._kept) + len(cache._recent) == RECENT + 11


def test_the_least_recently_used_text_leaves_first_and_kept_ones_stay():
    cache, encode = TextCache(max_bytes=2 * ROW_BYTES), Encoder()
    cache.keep(["kept"], encode)
    cache.rows([str(n) for n in range(RECENT)], encode)
    cache.rows(["0"], encode)
    cache.rows(["new"], encode)
    encoded = len(encode.chunks)
    cache.rows(["kept", "0", "new"], encode)
    assert len(encode.chunks) == encoded
    cache.rows(["1"], encode)
    assert encode.chunks[encoded:] == [["1"]]


def test_more_texts_than_fit_are_all_returned():
    cache, encode = TextCache(max_bytes=2 * ROW_BYTES), Encoder()
    texts = [str(n) for n in range(RECENT + 5)]
    assert set(cache.rows(texts, encode)) == {"", *texts}


def test_the_embedding_of_a_prompt_does_not_depend_on_the_prompts_before_it():
    """A resumed run does not encode what the steps before it had encoded."""
    texts = ["a red circle", "a blue square and a star", "two green dots", "a dot"]
    rows = []
    for history in ([], texts[2:], texts[:1]):
        model = load_model(sd3_config())
        model._texts.max_bytes = 1
        model.remember(["a circle and a dot"])
        if history:
            model.encode(history)
        rows.append(model.encode(texts).inputs["embeds"])
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


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
    model._texts.rows([""], model._encode_chunks)
    model.remember([f"{n} circles" for n in range(ENCODE_AT_ONCE + 3)])
    assert chunks == [1, ENCODE_AT_ONCE, 3]
    assert visits == ["begin", "end"] * 2
    model.encode(["2 circles", "66 circles"])
    assert len(chunks) == 3


def test_no_more_prompts_are_remembered_than_fit():
    model = load_model(sd3_config())
    row = model._texts.rows([], model._encode_chunks)[""]
    model._texts.max_bytes = 3 * sum(tensor.nbytes for tensor in row.values())
    encoded, encode = [], model.encode_texts
    model.encode_texts = lambda texts: encoded.extend(texts) or encode(texts)
    model.remember(["a circle", "a square", "a dot", "a star"])
    assert encoded == []
    model.remember(["a circle", "a square"])
    assert encoded == ["a circle", "a square"]


def test_a_network_that_visited_a_device_has_its_own_parameters_back():
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in tensors_of(network)}

    def fail_there():
        with visiting([network], torch.device("meta")):
            assert all(tensor.is_meta for _, tensor in tensors_of(network))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_there()
    for name, tensor in tensors_of(network):
        address, values = before[name]
        assert tensor.data_ptr() == address
        assert torch.equal(tensor, values)


@pytest.mark.parametrize("stay", [False, True])
def test_text_encoders_stay_on_the_device_on_request(stay):
    model = load_model(sd3_config(keep_text_encoders=stay))
    model.device = torch.device("meta")
    for _visit in range(2):
        with model.text_encoders_on_device():
            assert model.pipe.text_encoder.device.type == "meta"
        assert model.pipe.text_encoder.device.type == ("meta" if stay else "cpu")


def tensors_of(network):
    return [*network.named_parameters(), *network.named_buffers()]
