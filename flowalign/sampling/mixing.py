"""A policy whose adapter is the sum of several, each at its own strength."""

from collections.abc import Sequence
from dataclasses import replace

from flowalign.models.base import FlowModel
from flowalign.models.config import Lora
from flowalign.models.layer_adapter import LayerAdapter, total
from flowalign.policy import Policy, Sampler
from flowalign.sampling.adapters import MixedAdapter


def mixed_policy(model: FlowModel, sampler: Sampler, adapters: Sequence[MixedAdapter]) -> Policy:
    """Return a policy whose adapter is the sum of some, each at its strength.

    Raises UserError naming an adapter that cannot be read or does not fit the model.
    """
    changes = [_scaled(model, adapter) for adapter in adapters]
    layers = list(dict.fromkeys(layer for each in changes for layer in each))
    sums = {layer: total([each[layer] for each in changes if layer in each]) for layer in layers}
    rank = max(1, *(each.rank for each in sums.values()))
    model.config = replace(model.config, lora=Lora(rank=rank, alpha=rank, targets=layers))
    policy = Policy(model, sampler)
    policy.begin_as(sums)
    return policy


def _scaled(model: FlowModel, adapter: MixedAdapter) -> dict[str, LayerAdapter]:
    changes = model.read_adapter(adapter.path, "adapter")
    return {
        layer: replace(each, scale=adapter.strength * each.scale) for layer, each in changes.items()
    }
