"""Frozen weights that are split over processes: FSDP2, one block at a time."""

from collections.abc import Sequence

import torch
from torch import nn


def shard(network: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Split the weights of a network over all processes, and move each part to the device.

    A block's weights are gathered when it computes, forward and backward, and freed afterwards.
    Adapters that are added later stay whole on every process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    network.requires_grad_(False)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    # The rest, such as the embeddings and the last layer.
    fully_shard(network, mesh=mesh)
