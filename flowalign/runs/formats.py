"""Exports of a trained adapter as files of other tools, or as a model that holds it."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from flowalign.config.sections import Config
from flowalign.errors import UserError
from flowalign.files import write_file, write_folder
from flowalign.models.families import family_of
from flowalign.models.given_adapters import find_file, read_adapter
from flowalign.models.hub import read_index
from flowalign.models.layer_adapter import LayerAdapter, total
from flowalign.models.layer_names import Layers
from flowalign.models.lora import ADAPTER_FILE, KOHYA_PREFIX, PREFIX
from flowalign.runs.adapter import read_header, with_sorted_header
from flowalign.runs.adapter_card import CARD, model_card

Adapters = Mapping[str, LayerAdapter]
"""The changes of some layers, by the names of the layers."""
SUFFIX = ".safetensors"
KEPT = ("LICENSE*", "NOTICE*")
"""Files at the top of a model's folder that belong to every copy of the model."""


@dataclass(frozen=True)
class ExportFormat:
    """A form in which a trained adapter leaves a run."""

    default_name: Callable[[str], str]
    """Name of the file or folder for the name of a checkpoint."""
    write: Callable[[Path, Path, Config], None]
    """Takes the folder of the trained weights, the target, and the configuration of the run."""


def write_comfyui(trained: Path, file: Path, config: Config) -> None:
    """Write a file of diffusers' names, which ComfyUI maps to its own.

    ComfyUI itself places the rows of joined layers and turns the order of scale and shift, so no
    layer loses anything, and diffusers loads the same file.

    Raises UserError if ComfyUI does not map the family, or if the file exists with other content.
    """
    prefix = family_of(config.model.name).comfyui_prefix
    if prefix is None:
        raise UserError(
            f"ComfyUI maps no names of the family {config.model.name}. Choose --format diffusers."
        )
    _refuse_dora(trained)
    _write_new(file, named_as_in_diffusers(_sums(read_all(trained, config)[1]), prefix))


def named_as_in_diffusers(adapters: Adapters, prefix: str) -> dict[str, Tensor]:
    """Return the matrices of adapters by their names in diffusers, with the scale in B."""
    tensors = {}
    for layer, adapter in adapters.items():
        folded = adapter.folded()
        tensors[f"{prefix}{layer}.lora_A.weight"] = folded.a
        tensors[f"{prefix}{layer}.lora_B.weight"] = folded.b
    return tensors


def copy_merged(path: str, file: Path, config: Config) -> None:
    """Copy an adapter of `model.merge` as a file of diffusers.

    Raises UserError if it is missing, or if its names cannot be translated.
    """
    source = find_file(path, "model.merge")
    if source.name == ADAPTER_FILE:
        shutil.copyfile(source, file)
        return
    adapters = read_adapter(path, layers_of(config), "model.merge")
    save_file(named_as_in_diffusers(adapters, PREFIX), file)


def write_kohya(trained: Path, file: Path, config: Config) -> None:
    """Write a file of the names that kohya's scripts use: those of the model's original code.

    Raises UserError if a layer has no such name, or if the file exists with other content.
    """
    _refuse_dora(trained)
    layers, adapters = read_all(trained, config)
    tensors = {}
    for name, adapter in layers.to_original(_sums(adapters)).items():
        tensors[f"{KOHYA_PREFIX}{name}.lora_down.weight"] = adapter.a
        tensors[f"{KOHYA_PREFIX}{name}.lora_up.weight"] = adapter.b
        # The scripts scale by alpha / rank.
        tensors[f"{KOHYA_PREFIX}{name}.alpha"] = torch.tensor(float(adapter.rank))
    _write_new(file, tensors)


def write_merged(trained: Path, folder: Path, config: Config) -> None:
    """Write the whole model with the adapter in the weights of its transformer.

    The sums are rounded to the dtype of the model's files. Other parts are copied.

    Raises UserError if the model is not a pipeline of diffusers, or if the folder exists.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already. Choose a new folder: --output FOLDER.")
    source = family_of(config.model.name).model_folder(config.evaluation_model)
    _, adapters = read_all(trained, config)

    def write(unfinished: Path) -> None:
        copy_other_parts(source, unfinished)
        add_to_files(adapters, source / "transformer", unfinished / "transformer")
        (unfinished / CARD).write_text(model_card(config, folder), encoding="utf-8")

    write_folder(folder, write)


def read_all(trained: Path, config: Config) -> tuple[Layers, list[Adapters]]:
    """Return the layers of the model, and the adapters of `model.merge` before the trained one."""
    layers = layers_of(config)
    merged = [read_adapter(path, layers, "model.merge") for path in config.model.merge]
    return layers, [*merged, read_adapter(str(trained), layers, "the trained adapter", dora=True)]


def layers_of(config: Config) -> Layers:
    """Return the layers of a run's model, which no weights are loaded for."""
    family = family_of(config.model.name)
    return family.layers_of(family.empty_transformer(config.model))


def _refuse_dora(trained: Path) -> None:
    """Raise UserError if an adapter is a DoRA."""
    if read_header(trained / ADAPTER_FILE).lora.use_dora:
        raise UserError(
            "The adapter is a DoRA, which not all tools of this format read. "
            "Choose --format diffusers or merged."
        )


def copy_other_parts(source: Path, target: Path) -> None:
    """Copy what a pipeline loads, apart from its transformer. Links become files."""
    index = read_index(str(source))
    for name in index:
        if (source / name).is_dir() and name != "transformer":
            shutil.copytree(source / name, target / name)
    kept = [path for pattern in KEPT for path in source.glob(pattern)]
    for path in [source / "model_index.json", *kept]:
        shutil.copyfile(path, target / path.name)


def add_to_files(adapters: Sequence[Adapters], source: Path, target: Path) -> None:
    """Copy the files of a transformer, with adapters in its weights.

    One file is in memory at a time. Raises UserError if the weight of a layer is missing.
    """
    target.mkdir()
    for path in source.glob("*.json"):
        shutil.copyfile(path, target / path.name)
    missing = {f"{layer}.weight" for each in adapters for layer in each}
    for path in source.glob(f"*{SUFFIX}"):
        with safe_open(path, "pt") as content:
            metadata = content.metadata()
            tensors = {name: content.get_tensor(name) for name in content.keys()}
        for name in tensors:
            layer = name.removesuffix(".weight")
            changes = [each[layer] for each in adapters if layer in each]
            if name != layer and changes:
                tensors[name] = _changed(tensors[name], changes)
        missing -= tensors.keys()
        save_file(tensors, target / path.name, metadata)
        # The library makes files that only their owner may read.
        shutil.copymode(path, target / path.name)
    if missing:
        raise UserError(f"{source} has no tensor {min(missing)}. Copy the model again.")


def _changed(weight: Tensor, changes: Sequence[LayerAdapter]) -> Tensor:
    """Return a weight with changes, rounded to its dtype once."""
    changed = weight.float()
    for each in changes:
        changed = each.added_to(changed)
    return changed.to(weight.dtype)


def _sums(adapters: Sequence[Adapters]) -> dict[str, LayerAdapter]:
    """Return the total change of every layer."""
    layers = dict.fromkeys(layer for each in adapters for layer in each)
    return {layer: total([each[layer] for each in adapters if layer in each]) for layer in layers}


def _write_new(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file. Raises UserError if its name is wrong, or if it exists with other content."""
    if file.suffix != SUFFIX:
        raise UserError(f"{file} is not the name of a {SUFFIX} file. Give one: --output FILE.")
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    content = with_sorted_header(save(whole, {"format": "pt"}))
    if file.exists() and (file.is_dir() or file.read_bytes() != content):
        raise UserError(f"{file} exists already. Choose another file: --output FILE.")
    write_file(file, content)


FORMATS = {
    "comfyui": ExportFormat(lambda step: f"adapter-{step}-comfyui{SUFFIX}", write_comfyui),
    "kohya": ExportFormat(lambda step: f"adapter-{step}-kohya{SUFFIX}", write_kohya),
    "merged": ExportFormat(lambda step: f"model-{step}", write_merged),
}
"""Formats of `flowalign export` beside that of diffusers."""
