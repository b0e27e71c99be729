"""Why a model could not be opened."""

from pathlib import Path

import pytest
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers import AutoConfig

from flowalign.errors import UserError
from flowalign.models.hub import explain_loading, pretrained, read_index
from tests.tiny import ROOT


def raised(kind: type[Exception], text: str) -> Exception:
    """An OSError with another error as its cause, as transformers raises it."""
    error = OSError("it could not be loaded")
    error.__cause__ = kind.__new__(kind)
    error.__cause__.args = (text,)
    return error


@pytest.mark.parametrize(
    ("path", "error", "explanation"),
    [
        (
            "org/clip",
            raised(GatedRepoError, "401 Client Error. Cannot access gated repo"),
            "is gated or private",
        ),
        (
            "org/clip",
            raised(RepositoryNotFoundError, "401 Client Error. A private or gated repo?"),
            "no hub repository named",
        ),
        ("org/clip", raised(LocalEntryNotFoundError, "not on disk"), "the hub cannot be reached"),
        (
            "org/clip-404",
            raised(ConnectionError, "no route to org/clip-404"),
            "the hub cannot be reached",
        ),
        ("org/clip", raised(ConnectionError, "request id 7f4031"), "the hub cannot be reached"),
        ("org/clip", raised(ValueError, "request id 7f4031"), "cannot be opened as a model"),
        (
            "org/clip",
            raised(EntryNotFoundError, "404 Client Error: no config.json"),
            "cannot be opened as a model",
        ),
    ],
)
def test_a_failure_is_explained_by_its_class_and_not_by_digits(path, error, explanation):
    assert explanation in explain_loading("key", path, error)


def test_a_path_may_begin_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", str(ROOT / "assets"))
    assert pretrained(AutoConfig, "key", "~/tiny-clip").model_type == "clip"
    with pytest.raises(UserError, match=f"key: there is no folder {Path.home()}/nowhere"):
        pretrained(AutoConfig, "key", "~/nowhere")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "{", "\udcff"])
def test_a_model_index_that_is_not_json_is_named(content, tmp_path):
    index = tmp_path / "model_index.json"
    index.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(
        UserError, match=rf"^model\.path: {index} is not JSON.* Save the model again"
    ):
        read_index(str(tmp_path))
