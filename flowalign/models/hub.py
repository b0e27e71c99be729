"""Model folders and repositories on the Hugging Face hub, and why one cannot be opened."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowalign.errors import similar_file, UserError

EXPLANATIONS = [
    (
        ("RepositoryNotFoundError", "not a valid model identifier"),
        "there is no folder and no hub repository named {path}. "
        "Check the spelling; a private repository needs `hf auth login`.",
    ),
    (
        ("GatedRepoError", "gated repo", "401 Client Error", "403 Client Error", "403 Forbidden"),
        "{path} is gated or private. Accept its licence at https://huggingface.co/{path}, then run "
        "`hf auth login` (or set HF_TOKEN), or use a local folder.",
    ),
    (
        (
            *("ConnectionError", "ConnectError", "LocalEntryNotFoundError", "OfflineMode"),
            *("couldn't connect", "Max retries"),
        ),
        "there is no folder {path}, and the hub cannot be reached. "
        "Download the model first, or use a local folder.",
    ),
]
"""Class names and phrases in a chain of errors, and the explanation they stand for."""


def is_local(path: str) -> bool:
    """True if a path can only mean a folder: a repository on the hub is owner/name."""
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        return True
    return os.path.isdir(os.path.dirname(path))


def explain_loading(key: str, path: str, error: BaseException) -> str:
    """Return why a model could not be opened and what to do about it."""
    chain = causes_of(error)
    # Class names and phrases, because digits such as 404 also occur in paths and request numbers.
    if not os.path.isdir(path):
        for phrases, explanation in EXPLANATIONS:
            if any(phrase in chain for phrase in phrases):
                return f"{key}: {explanation.format(path=path)}"
    return f"{key}: {path} cannot be opened as a model: {error}"


def causes_of(error: BaseException) -> str:
    """Return an error and its causes, a line each: libraries wrap the hub's errors in their own."""
    causes: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(f"{type(cause).__name__} {cause}")
        cause = cause.__cause__ or cause.__context__
    return "\n".join(causes)


# The class is untyped: Auto classes of transformers return instances of other classes.
def pretrained(cls: Any, key: str, path: str, **settings: object) -> Any:
    """Return cls.from_pretrained(path, ...).

    Raises UserError that names the key and says what to do if the model cannot be opened.
    """
    from transformers.utils import logging  # slow to import, and `cls` has imported it already

    path = os.path.expanduser(path)
    if is_local(path) and not os.path.exists(path):
        raise UserError(f"{key}: there is no folder {path}.")
    logging.disable_progress_bar()
    try:
        return cls.from_pretrained(path, **settings)
    except Exception as error:
        raise UserError(explain_loading(key, path, error)) from error


def read_index(
    path: str, revision: str | None = None, key: str = "model.path"
) -> Mapping[str, object]:
    """Return the content of a pipeline's `model_index.json`, from a folder or the hub.

    Raises UserError if there is none. Only this one file is downloaded.
    """
    folder = Path(os.path.expanduser(path))
    if os.path.isdir(folder):
        index = folder / "model_index.json"
        if not index.is_file():
            raise UserError(
                f"{key}: {folder} is not a model, because it has no model_index.json. "
                "Use the folder that a diffusers pipeline was saved to."
            )
    elif is_local(path):
        raise UserError(f"{key}: there is no folder {path}.{similar_file(path)}")
    else:
        index = _download_index(path, revision, key)
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{key}: {index} is not JSON: {error}. Save the model again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{key}: {index} does not hold a mapping. Save the model again.")
    return content


def _download_index(path: str, revision: str | None, key: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(path, "model_index.json", revision=revision))
    # The hub's errors have no common base class apart from Exception.
    except Exception as error:
        raise UserError(explain_loading(key, path, error)) from error
