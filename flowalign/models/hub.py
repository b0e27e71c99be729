"""Model folders and repositories on the hub, and why one of them cannot be opened."""

import os
from pathlib import Path
from typing import Any

from flowalign.errors import UserError

ANSWERS = [
    (
        ("RepositoryNotFoundError", "not a valid model identifier"),
        "there is no folder and no hub repository named {path}. Check the spelling; a private one needs `hf auth login`.",
    ),
    (
        ("GatedRepoError", "gated repo", "401 Client Error", "403 Client Error", "403 Forbidden"),
        "{path} is gated or private. Accept its licence at https://huggingface.co/{path}, then run "
        "`hf auth login` (or set HF_TOKEN), or give a local folder.",
    ),
    (
        (
            "ConnectionError",
            "ConnectError",
            "LocalEntryNotFoundError",
            "OfflineMode",
            "couldn't connect",
            "Max retries",
        ),
        "there is no folder {path}, and the hub cannot be reached. Download the model first, or give a local folder.",
    ),
]
"""Classes and words of the hub in the story of an error, and what to say then."""


def is_local(path: str) -> bool:
    """Whether a path can only mean a folder: a repository on the hub is owner/name."""
    return path.count("/") != 1 or path.startswith((".", "/", "~")) or Path(path).parent.is_dir()


def explain_loading(key: str, path: str, error: BaseException) -> str:
    """Why a model could not be opened, and what to do about it."""
    causes, cause = [], error
    while cause is not None:
        causes.append(f"{type(cause).__name__} {cause}")
        cause = cause.__cause__ or cause.__context__
    story = "\n".join(causes)
    if Path(path).is_dir():
        return f"{key}: {path} cannot be opened as a model: {error}"
    for words, answer in ANSWERS:
        if any(word in story for word in words):
            return f"{key}: {answer.format(path=path)}"
    return f"{key}: {path} cannot be opened as a model: {error}"


def pretrained(cls: Any, key: str, path: str, **settings: Any) -> Any:
    """cls.from_pretrained(path, ...). UserError that names the key and says what to do when it cannot be opened."""
    from transformers.utils import logging  # slow to import, and `cls` has done it

    path = os.path.expanduser(path)
    if is_local(path) and not Path(path).exists():
        raise UserError(f"{key}: there is no folder {path}.")
    logging.disable_progress_bar()
    try:
        return cls.from_pretrained(path, **settings)
    except Exception as error:
        raise UserError(explain_loading(key, path, error)) from error
