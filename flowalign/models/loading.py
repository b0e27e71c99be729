"""Open a diffusers pipeline from a folder or the hub."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flowalign.errors import similar_file, UserError
from flowalign.models.config import ModelConfig
from flowalign.models.hub import explain_loading, is_local, read_index

ABSENT = [None, None]
"""The entry of `model_index.json` for a component that was not saved."""


def load_pipeline(
    pipeline: Any, config: ModelConfig, optional: Sequence[str], unused: Sequence[str]
) -> Any:
    """Load a pipeline from a folder or the hub.

    Args:
        pipeline: The pipeline class.
        config: Path, revision and dtype.
        optional: Components that the folder may lack.
        unused: Components that are left out in any case.

    Raises:
        UserError: The model is missing, damaged or of another class. The message says what to do.
    """
    from safetensors import SafetensorError

    _silence_progress()
    path = os.path.expanduser(config.path)
    absent = [*unused, *_absent_components(pipeline.__name__, path, config.name, optional)]
    try:
        return pipeline.from_pretrained(
            path,
            revision=config.revision,
            dtype={"default": getattr(torch, config.dtype), "vae": torch.float32},
            # Pickled weights can run code, so a model without safetensors is refused.
            use_safetensors=True,
            # A pipeline that was saved without a component loads only if it is passed as None.
            **dict.fromkeys(absent),
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(explain_loading("model.path", config.path, error)) from error


def _absent_components(
    pipeline_name: str, path: str, name: str, optional: Sequence[str]
) -> list[str]:
    """Check that a folder holds the pipeline, and return the components that it lacks."""
    # os.path and not Path: a name too long for the file system is a folder that does not exist.
    if not os.path.isdir(path) and not is_local(path):
        return []
    if not os.path.isdir(path):
        raise UserError(f"model.path: there is no folder {path}.{similar_file(path)}")
    index: Mapping[str, object] = read_index(path)
    kind = index.get("_class_name")
    if kind != pipeline_name:
        raise UserError(
            f"model.path: {path} holds a {kind}, but model.name {name!r} needs a {pipeline_name}. "
            "Leave model.name out to read it from the folder."
        )
    return [name for name in optional if index.get(name) == ABSENT]


def _silence_progress() -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
