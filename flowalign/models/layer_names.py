"""Names of a transformer's layers: those of diffusers, and those of the model's original code.

kohya's scripts name layers as the original code does, with underscores for dots.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from flowalign.errors import did_you_mean, UserError
from flowalign.models.layer_adapter import joined, LayerAdapter

FusedLayers = Mapping[str, Sequence[str]]
"""Layers under their names in the model's original code, and the layers of diffusers that each
joins, in the order of their outputs. `{}` stands for the number of a block."""


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The linear layers of a transformer, and what the original code makes of them."""

    linears: Mapping[str, nn.Linear]
    """The layers by their names in diffusers. They need no weights."""
    fused: FusedLayers
    """The names in the original code."""
    swapped: Collection[str] = ()
    """Layers with a scale above a shift, which the original code has in the other order."""

    def original(self, layer: str) -> tuple[str, list[str]] | None:
        """Return the original name of a layer, and all layers that it joins; None if unknown."""
        for pattern, members in self.fused.items():
            for member in members:
                if match := _match(member, layer):
                    numbers = match.groups()
                    return pattern.format(*numbers), [each.format(*numbers) for each in members]
        return None

    def members(self, name: str) -> list[str]:
        """Return the layers that a name of diffusers or of the original code stands for."""
        if name in self.linears:
            return [name]
        for pattern, members in self.fused.items():
            if match := _match(pattern, name):
                return [each.format(*match.groups()) for each in members]
        return []

    def from_file(self, name: str, adapter: LayerAdapter, key: str) -> dict[str, LayerAdapter]:
        """Return the adapters of the layers that a name of a file stands for.

        `key` is the key of the configuration. Raises UserError if there is no such layer, or if it
        has another size.
        """
        names = self.members(name)
        if not names or any(layer not in self.linears for layer in names):
            raise UserError(
                f"{key}: the model has no layer {name}.{did_you_mean(name, self.linears)} Give an "
                "adapter of this model."
            )
        sizes = [self.linears[layer].out_features for layer in names]
        wanted = sum(sizes), self.linears[names[0]].in_features
        shape = len(adapter.b), adapter.a.shape[1]
        if shape != wanted:
            raise UserError(
                f"{key}: the adapter of {name} is for a weight of {shape[0]} × {shape[1]}, but the "
                f"model's is {wanted[0]} × {wanted[1]}. Give an adapter of this model."
            )
        if names == [name]:
            return {name: adapter}
        parts = adapter.split(sizes) if names[1:] else [adapter]
        return {layer: self._turned(layer, part) for layer, part in zip(names, parts, strict=True)}

    def to_original(self, adapters: Mapping[str, LayerAdapter]) -> dict[str, LayerAdapter]:
        """Return the same changes by the original names of the layers, with a scale of 1.

        Raises UserError naming a layer whose original name is unknown.
        """
        joins: dict[str, list[str]] = {}
        for layer in adapters:
            names = self.original(layer)
            if names is None:
                raise UserError(
                    f"{layer} has no name in kohya's scripts, so that they could not load its "
                    "adapter. Choose --format diffusers or merged."
                )
            joins[names[0]] = names[1]
        return {name: self._joined(layers, adapters) for name, layers in joins.items()}

    def _joined(self, layers: Sequence[str], adapters: Mapping[str, LayerAdapter]) -> LayerAdapter:
        parts = [
            self._turned(layer, adapters[layer]) if layer in adapters else None for layer in layers
        ]
        return joined(parts, [self.linears[layer].out_features for layer in layers])

    def _turned(self, layer: str, adapter: LayerAdapter) -> LayerAdapter:
        """Return an adapter of this code for the original code, or the other way round."""
        return adapter.swapped() if layer in self.swapped else adapter


def in_blocks(original: str, diffusers: str, layers: FusedLayers) -> dict[str, Sequence[str]]:
    """Return the names of layers within numbered blocks, in the original code and in diffusers."""
    return {
        f"{original}_{{}}_{name}": [f"{diffusers}.{{}}.{layer}" for layer in members]
        for name, members in layers.items()
    }


def linear_layers(network: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of a network by name."""
    modules = network.named_modules()
    return {name: module for name, module in modules if isinstance(module, nn.Linear)}


def last_block(layers: Iterable[str], ending: str) -> str:
    """Return the layer of the last block among those whose names end so."""
    names = [name for name in layers if name.endswith(ending)]
    return max(names, key=lambda name: int(re.findall(r"\d+", name)[0]))


def _match(pattern: str, name: str) -> re.Match[str] | None:
    """Return the match of a name with a pattern, whose groups are the numbers of its blocks."""
    return re.fullmatch(re.escape(pattern).replace(r"\{\}", r"(\d+)"), name)
