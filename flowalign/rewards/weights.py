"""Published weights that are not in transformers' layout: read without running anything, renamed, and put into its classes."""

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor

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
    """Linear layers with nothing between them as one: W_n (… (W_1 x + b_1) …) + b_n = weight · x + bias."""
    layers = sorted(
        int(name.split(".")[-2])
        for name in state
        if name.startswith(prefix) and name.endswith(".weight")
    )
    if not layers:
        raise UserError(
            f"{key}: the file has no {prefix}0.weight; it has {', '.join(list(state)[:3])}, …"
        )
    width = state[f"{prefix}{layers[0]}.weight"].shape[1]
    weight, bias = torch.eye(width).double(), torch.zeros(width).double()
    for n in layers:
        w, b = state[f"{prefix}{n}.weight"].double(), state[f"{prefix}{n}.bias"].double()
        weight, bias = w @ weight, w @ bias + b
    return weight[0].float(), bias.item()


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's weights as transformers' CLIPModel has them."""
    found = {}
    for name, tensor in renamed(state, OPEN_CLIP).items():
        if name in ("visual_projection.weight", "text_projection.weight"):
            found[name] = tensor.T.contiguous()  # there x W, here W x
        elif "in_proj_" in name:
            found |= {
                name.replace("in_proj_", f"{part}_proj."): rows
                for part, rows in zip("qkv", tensor.chunk(3), strict=True)
            }
        else:
            found[name] = tensor
    return found


def renamed(state: dict[str, Tensor], rules: dict[str, str]) -> dict[str, Tensor]:
    """The same tensors, every rule applied to their names in turn."""

    def new(name: str) -> str:
        for pattern, replacement in rules.items():
            name = re.sub(pattern, replacement, name)
        return name

    return {new(name): tensor for name, tensor in state.items()}


def with_weights(
    model_class: Any, config: Any, state: dict[str, Tensor], key: str, **settings: Any
) -> Any:
    """A model of this size with these weights. UserError where one is missing or has another shape."""
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
            f"{key}: the weights do not fit a {model_class.__name__} of this size: {error}"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{key}: the file lacks {len(missing)} weights of a {model_class.__name__}, {missing[0]} for one."
        )
    return model


def read_weights(key: str, path: str) -> dict[str, Tensor]:
    """The tensors in a local file, or in owner/name/file on the hub; nothing else that the file may hold is run."""
    file = Path(path).expanduser()
    if not file.is_file():
        if path.count("/") < 2 or path.startswith((".", "/", "~")) or file.parent.is_dir():
            raise UserError(
                f"{key}: there is no file {path}. Give a local file, or owner/name/file of the hub."
            )
        owner, name, inside = path.split("/", 2)
        try:
            file = Path(hf_hub_download(f"{owner}/{name}", inside))
        except Exception as error:
            raise UserError(explain_loading(key, f"{owner}/{name}", error)) from error
    try:
        safe = file.suffix == ".safetensors"
        state: Any = (
            load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
        )
    except Exception as error:
        raise UserError(f"{key}: {path} cannot be read as a file of tensors: {error}") from error
    return state.get("state_dict", state)
