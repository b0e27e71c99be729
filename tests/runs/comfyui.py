"""Where ComfyUI puts the adapter of a layer: its published names and rules, written anew.

ComfyUI holds weights under the names of the model's original code. `rows` of a joined weight belong
to one layer of diffusers. Two halves of outputs are swapped where diffusers has the scale first.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Place:
    """The part of a weight that a layer of diffusers stands for."""

    weight: str
    start: int = 0
    swap: bool = False


def attention(block: str, names: list[str], hidden: int) -> dict[str, Place]:
    return {name: Place(block, number * hidden) for number, name in enumerate(names)}


def sd3_places(blocks: int, hidden: int) -> dict[str, Place]:
    """By diffusers' names of layers."""
    places = {
        "context_embedder": Place("context_embedder"),
        "time_text_embed.timestep_embedder.linear_1": Place("t_embedder.mlp.0"),
        "time_text_embed.timestep_embedder.linear_2": Place("t_embedder.mlp.2"),
        "time_text_embed.text_embedder.linear_1": Place("y_embedder.mlp.0"),
        "time_text_embed.text_embedder.linear_2": Place("y_embedder.mlp.2"),
        "norm_out.linear": Place("final_layer.adaLN_modulation.1", swap=True),
        "proj_out": Place("final_layer.linear"),
    }
    for number in range(blocks):
        block = {
            **attention("x_block.attn.qkv", ["attn.to_q", "attn.to_k", "attn.to_v"], hidden),
            **attention("x_block.attn2.qkv", ["attn2.to_q", "attn2.to_k", "attn2.to_v"], hidden),
            **attention(
                "context_block.attn.qkv",
                ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
                hidden,
            ),
            "attn.to_out.0": Place("x_block.attn.proj"),
            "attn2.to_out.0": Place("x_block.attn2.proj"),
            "attn.to_add_out": Place("context_block.attn.proj"),
            "ff.net.0.proj": Place("x_block.mlp.fc1"),
            "ff.net.2": Place("x_block.mlp.fc2"),
            "ff_context.net.0.proj": Place("context_block.mlp.fc1"),
            "ff_context.net.2": Place("context_block.mlp.fc2"),
            "norm1.linear": Place("x_block.adaLN_modulation.1"),
            "norm1_context.linear": Place(
                "context_block.adaLN_modulation.1", swap=number == blocks - 1
            ),
        }
        for layer, place in block.items():
            place.weight = f"joint_blocks.{number}.{place.weight}"
            places[f"transformer_blocks.{number}.{layer}"] = place
    return places


def flux_places(double: int, single: int, hidden: int) -> dict[str, Place]:
    """By diffusers' names of layers."""
    places = {
        "x_embedder": Place("img_in"),
        "context_embedder": Place("txt_in"),
        "time_text_embed.timestep_embedder.linear_1": Place("time_in.in_layer"),
        "time_text_embed.timestep_embedder.linear_2": Place("time_in.out_layer"),
        "time_text_embed.text_embedder.linear_1": Place("vector_in.in_layer"),
        "time_text_embed.text_embedder.linear_2": Place("vector_in.out_layer"),
        "norm_out.linear": Place("final_layer.adaLN_modulation.1", swap=True),
        "proj_out": Place("final_layer.linear"),
    }
    for number in range(double):
        added = ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]
        block = {
            **attention("img_attn.qkv", ["attn.to_q", "attn.to_k", "attn.to_v"], hidden),
            **attention("txt_attn.qkv", added, hidden),
            "attn.to_out.0": Place("img_attn.proj"),
            "attn.to_add_out": Place("txt_attn.proj"),
            "ff.net.0.proj": Place("img_mlp.0"),
            "ff.net.2": Place("img_mlp.2"),
            "ff_context.net.0.proj": Place("txt_mlp.0"),
            "ff_context.net.2": Place("txt_mlp.2"),
            "norm1.linear": Place("img_mod.lin"),
            "norm1_context.linear": Place("txt_mod.lin"),
        }
        for layer, place in block.items():
            place.weight = f"double_blocks.{number}.{place.weight}"
            places[f"transformer_blocks.{number}.{layer}"] = place
    for number in range(single):
        names = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]
        block = {
            **attention("linear1", names, hidden),
            "proj_out": Place("linear2"),
            "norm.linear": Place("modulation.lin"),
        }
        for layer, place in block.items():
            place.weight = f"single_blocks.{number}.{place.weight}"
            places[f"single_transformer_blocks.{number}.{layer}"] = place
    return places


def load(file: dict[str, Tensor], places: dict[str, Place]) -> dict[str, dict[int, Tensor]]:
    """Changes by the name of the weight and the first row. Every tensor must have a place.

    B A is scaled by alpha / rank if there is an alpha.
    """
    known = {f"transformer.{layer}": place for layer, place in places.items()}
    for place in places.values():
        known[f"lora_unet_{place.weight.replace('.', '_')}"] = Place(place.weight)
    changes, used = {}, set()
    for name, place in known.items():
        for a, b in (("lora_A", "lora_B"), ("lora_down", "lora_up")):
            keys = [f"{name}.{a}.weight", f"{name}.{b}.weight"]
            if keys[0] not in file:
                continue
            down, up = (file[key] for key in keys)
            alpha = file.get(f"{name}.alpha")
            scale = 1.0 if alpha is None else alpha.item() / len(down)
            change = scale * (up @ down)
            if place.swap:
                change = torch.cat(change.chunk(2)[::-1])
            changes.setdefault(place.weight, {})[place.start] = change
            used |= {*keys, f"{name}.alpha"}
    assert set(file) <= used, sorted(set(file) - used)[:3]
    return changes
