"""The distance of a quantised model from the full one."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from flowalign.diagnostics.check.probes import Probe, row_by_row
from flowalign.flow import Latent
from flowalign.models import load_model
from flowalign.models.base import FlowModel
from flowalign.rewards.inspection import Finding

MAX_DISTANCE = 0.5
"""Distance of velocities above which something other than rounding must be wrong."""


@torch.no_grad()
def compare_full_model(model: FlowModel, bare: Latent, probe: Probe) -> Iterator[Finding]:
    """Yield how far the velocities are from those of full weights, if they are quantised.

    The full model is loaded once more. Its blocks stay in main memory, from where each layer comes
    to the device, so that both models fit. Both transformers take the same embeddings.

    Args:
        model: The model without adapters.
        bare: Its velocities of the probe.
        probe: Inputs of a velocity.
    """
    config = model.config
    if config.quantize == "none":
        return
    full_config = replace(config, quantize="none", offload=True)
    full = row_by_row(load_model(full_config, str(model.device)), probe)
    distance = ((bare - full).norm() / full.norm()).item()
    text = f"{config.quantize} changes velocities by {distance:.2%}, given the same embeddings"
    # Not `>`, so that NaN is wrong.
    yield Finding("quantize", text, wrong=not distance < MAX_DISTANCE)
