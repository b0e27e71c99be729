"""Load published weights that are not in transformers' layout.

The files are read without running any code in them, their tensors renamed, and put into
transformers' classes.
"""

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig

from flowalign.errors import UserError
from flowalign.models.hub import explain_loading

OPEN_CLIP = {
    r"^visual\.transformer\.resblocks": "vision_model.encoder.layers",
    r"^visual\.(class_embedding)$": r"vision_model.embeddings.\1",
    r"^visual\.positional_embedding$": "vision_model.embeddings.position_embedding.weight",
    r"^visual\.conv1": "vision_model.embeddings.patch_embedding",
    r"^visual\.ln_pre": "vision_model.pre_layrnorm",
    r"^visual\.ln_post": "vision_model.post_layernorm",
    r"^visual\.proj$": "visual_projection.weight",
    r"^transformer\.resblocks": "text_model.encoder.layers",
    r"^token_embedding": "text_model.embeddings.token_embedding",
    r"^positional_embedding$": "text_model.embeddings.position_embedding.weight",
    r"^ln_final": "text_model.final_layer_norm",
    r"^text_projection$": "text_projection.weight",
    r"\.ln_(\d)\.": r".layer_norm\1.",
    r"\.attn\.": ".self_attn.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
}
"""Names in open_clip's weights, and in transformers' CLIPModel."""


def affine(state: dict[str, Tensor], prefix: str, key: str) -> tuple[Tensor, float]:
    """Multiply linear layers without activations into one: weight · x + bias.

    The layers are `prefix0`, `prefix2`, ...; the last has one output. Raises UserError without
    any.
    """
    names = [name for name in state if name.startswith(prefix) and name.endswith(".weight")]
    if not names:
        raise UserError(
            f"{key}: the file has no {prefix}0.weight; it has {', '.join(list(state)[:3])}, …. "
            "Give the published file."
        )
    layers = sorted(int(name.split(".")[-2]) for name in names)
    width = state[f"{prefix}{layers[0]}.weight"].shape[1]
    # In float64, so that the product rounds less than the layers one after another.
    weight, bias = torch.eye(width).double(), torch.zeros(width).double()
    for n in layers:
        w, b = state[f"{prefix}{n}.weight"].double(), state[f"{prefix}{n}.bias"].double()
        weight, bias = w @ weight, w @ bias + b
    return weight[0].float(), bias.item()


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert open_clip's weights to those of transformers' CLIPModel."""
    converted = {}
    for name, tensor in renamed(state, OPEN_CLIP).items():
        if name in ("visual_projection.weight", "text_projection.weight"):
            converted[name] = tensor.T.contiguous()  # x W there, W x here
        elif "in_proj_" in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                converted[name.replace("in_proj_", f"{part}_proj.")] = rows
        else:
            converted[name] = tensor
    return converted


def renamed(state: dict[str, Tensor], rules: dict[str, str]) -> dict[str, Tensor]:
    """Apply all rules (pattern: replacement), in their order, to the names of tensors."""

    def new(name: str) -> str:
        for pattern, replacement in rules.items():
            name = re.sub(pattern, replacement, name)
        return name

    return {new(name): tensor for name, tensor in state.items()}


# The class and its result are untyped: transformers' classes share no type that says enough.
def with_weights(
    model_class: Any,
    config: PreTrainedConfig,
    state: dict[str, Tensor],
    key: str,
    **settings: object,
) -> Any:
    """Make a model of this configuration with these weights, in float32.

    Raises UserError if a weight is missing or has another shape.
    """
    try:
        model, report = model_class.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=torch.float32,
            output_loading_info=True,
            **settings,
        )
    except RuntimeError as error:
        raise UserError(
            f"{key}: the weights do not fit a {model_class.__name__} of this size: {error}. "
            "Give the published file."
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"{key}: the file lacks {len(missing)} weights of a {model_class.__name__}, such as "
            f"{missing[0]}. Give the published file."
        )
    return model


def read_weights(key: str, path: str) -> dict[str, Tensor]:
    """Read the tensors of a local file, or of owner/name/file on the hub.

    Nothing else in the file is loaded or run. Raises UserError if it cannot be read.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        file = _download(key, path)
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # `weights_only` refuses pickled code: a stranger's file must be harmless.
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # Unpickling raises many types, and each means that this is not a file of tensors.
        raise UserError(
            f"{key}: {path} cannot be read as a file of tensors: {error}. Download it again."
        ) from error
    return state.get("state_dict", state)


def _download(key: str, path: str) -> Path:
    """Download owner/name/file. Raises UserError if the path can only mean a local file."""
    is_local = path.startswith((".", "/", "~")) or Path(path).parent.is_dir()
    if path.count("/") < 2 or is_local:
        raise UserError(
            f"{key}: there is no file {path}. Give a local file, or owner/name/file of the hub."
        )
    owner, name, inside = path.split("/", 2)
    try:
        return Path(hf_hub_download(f"{owner}/{name}", inside))
    except Exception as error:
        raise UserError(explain_loading(key, f"{owner}/{name}", error)) from error
