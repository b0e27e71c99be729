"""Model families. Each knows its own diffusers classes, conditioning, packing and time scale; nothing else does."""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowalign.models.base import FlowModel
    from flowalign.models.config import ModelConfig

MODELS = {"sd3": "flowalign.models.sd3:SD3", "flux": "flowalign.models.flux:Flux"}
"""Names to classes, imported when asked for, so that `import flowalign` stays quick."""


def load_model(config: "ModelConfig", device: str = "cpu") -> "FlowModel":
    """The model of a configuration, on a device. Raises UserError when its folder or repository cannot be opened."""
    module, _, name = MODELS[config.name].partition(":")
    family: Callable[..., FlowModel] = getattr(import_module(module), name)
    return family(config, device)
