"""Open a diffusers pipeline from a folder or the hub."""

import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from flowalign.errors import similar_file, UserError
from flowalign.models.config import ModelConfig
from flowalign.models.hub import explain_loading, is_local


def load_pipeline(pipeline_class: type, config: ModelConfig, optional: list[str]) -> Any:
    """Diffusers' pipeline from a folder or the hub. Raises UserError that says what is missing and what to do."""
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    path = os.path.expanduser(config.path)
    folder = Path(path)
    dtype = {"default": getattr(torch, config.dtype), "vae": torch.float32}
    absent = dict.fromkeys(optional)
    if os.path.isdir(folder):
        index = folder / "model_index.json"
        if not index.is_file():
            wanted = "Give the folder that a diffusers pipeline was saved to."
            raise UserError(
                f"model.path: {folder} is not a model: it has no model_index.json. {wanted}"
            )
        try:
            found = json.loads(index.read_text())
        except ValueError as error:
            raise UserError(f"model.path: {index} is not JSON: {error}") from None
        if (kind := found.get("_class_name")) != pipeline_class.__name__:
            needed = f"model.name {config.name!r} needs a {pipeline_class.__name__}"
            raise UserError(f"model.path: {folder} holds a {kind}, but {needed}.")
        absent |= {
            name: None
            for name in ("text_encoder_3", "tokenizer_3")
            if found.get(name) == [None, None]
        }
    elif is_local(path):
        raise UserError(f"model.path: there is no folder {config.path}.{similar_file(config.path)}")
    try:
        return pipeline_class.from_pretrained(
            path, revision=config.revision, dtype=dtype, use_safetensors=True, **absent
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(explain_loading("model.path", config.path, error)) from error


def describe(path: str) -> ModelConfig:
    """The configuration of a model folder or repository, read from its own files, for making pictures with it."""
    path = os.path.expanduser(path)
    if not Path(path).is_dir() and is_local(path):
        raise UserError(f"there is no folder {path}.")
    try:
        index: Any = DiffusionPipeline.load_config(path)
        vae: Any = AutoencoderKL.load_config(path, subfolder="vae")
    except (OSError, ValueError) as error:
        raise UserError(explain_loading("model.path", path, error)) from error
    families: dict[str, Literal["sd3", "flux"]] = {
        "StableDiffusion3Pipeline": "sd3",
        "FluxPipeline": "flux",
    }
    if (kind := index.get("_class_name")) not in families:
        raise UserError(
            f"{path} holds a {kind}; pictures can be made with {' or '.join(families)}."
        )
    family, side = families[kind], vae["sample_size"]
    tokens = 256 if index.get("text_encoder_3", [None, None]) != [None, None] else 0
    if family == "flux":
        tokens = AutoTokenizer.from_pretrained(path, subfolder="tokenizer_2").model_max_length
    dtype: Any = (
        {"sd3": "float16", "flux": "bfloat16"}[family] if torch.cuda.is_available() else "float32"
    )
    return ModelConfig(
        family, path, dtype=dtype, height=side, width=side, max_sequence_length=tokens
    )
