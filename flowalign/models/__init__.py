"""Model families. One file holds all that is special to a family; no other folder names one.

A new family is one file and a row in the tables below, or a path: `name: my_family.py:MyModel`.
"""

from typing import TYPE_CHECKING

from flowalign.progress import task

if TYPE_CHECKING:
    from flowalign.models.base import FlowModel
    from flowalign.models.config import ModelConfig

# Paths instead of classes: importing the classes would import torch.
MODELS = {
    "sd3": "flowalign.models.sd3:SD3",
    "flux": "flowalign.models.flux:Flux",
    "flux2-klein": "flowalign.models.flux2:Flux2Klein",
    "flux2-dev": "flowalign.models.flux2:Flux2Dev",
    "z-image": "flowalign.models.z_image:ZImage",
    "qwen-image": "flowalign.models.qwen_image:QwenImage",
    "qwen-image-2.1": "flowalign.models.qwen_image21:QwenImage21",
    "sana": "flowalign.models.sana:Sana",
}
"""Names to classes, imported when they are needed."""

PIPELINES = {
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "Flux2KleinPipeline": "flux2-klein",
    "Flux2Pipeline": "flux2-dev",
    "ZImagePipeline": "z-image",
    "QwenImagePipeline": "qwen-image",
    "QwenImage21Pipeline": "qwen-image-2.1",
    "SanaPipeline": "sana",
}
"""Pipeline classes, as `model_index.json` names them, to names of families."""

ALIASES = {
    **dict.fromkeys(("sd3-medium", "sd3.5", "sd3.5-medium", "sd3.5-large"), "sd3"),
    **dict.fromkeys(("stable-diffusion-3", "stable-diffusion-3.5"), "sd3"),
    **dict.fromkeys(("flux.1", "flux.1-dev", "flux.1-schnell", "flux-dev", "flux-schnell"), "flux"),
    **dict.fromkeys(("flux.2-klein", "flux2", "flux.2"), "flux2-klein"),
    "flux.2-dev": "flux2-dev",
    **dict.fromkeys(("z-image-turbo", "zimage"), "z-image"),
    **dict.fromkeys(("qwen-image-2512", "qwen_image"), "qwen-image"),
    **dict.fromkeys(("qwen-image-2.1-turbo", "qwen-image-21", "qwen_image_2.1"), "qwen-image-2.1"),
    **dict.fromkeys(("sana-1.5", "sana1.5"), "sana"),
}
"""Other names that users write, in small letters."""


def load_model(config: "ModelConfig", device: str = "cpu") -> "FlowModel":
    """Load the model of a configuration.

    Raises UserError if its folder or repository cannot be opened.
    """
    # They import torch, which the tables do not need.
    from flowalign.models.compiled import compile_blocks
    from flowalign.models.families import family_of

    with task(f"loading {config.path}"):
        model = family_of(config.name)(config, device)
    if config.compile:
        compile_blocks(model.blocks)
    return model
