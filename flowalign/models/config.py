"""The `model` section of a YAML file."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from diffusers.models.attention_dispatch import AttentionBackendName
from pydantic import Field

from flowalign.errors import did_you_mean
from flowalign.settings.types import Count, Settings, WrongSetting

ATTENTION = {"sd3": ["native", "xformers"], "flux": [name.value for name in AttentionBackendName]}
Side = Annotated[int, Field(ge=16, le=4096)]


@dataclass
class Lora(Settings):
    """A low-rank adapter (arXiv 2106.09685) on the transformer's linear layers, in float32."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 32
    alpha: Count = 64
    """The adapter's output is scaled by alpha / rank."""
    targets: list[str] = field(default_factory=list)
    """Endings of the names of the adapted layers; none for the family's published choice."""
    init: Literal["default", "gaussian"] = "gaussian"


@dataclass
class ModelConfig(Settings):
    """A model in diffusers' folder layout."""

    name: Literal["sd3", "flux"]
    path: str
    """A local folder, or a repository on the Hugging Face hub."""
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the transformer and the text encoders. Adapters, latents and the autoencoder stay in float32."""
    height: Side = 512
    width: Side = 512
    max_sequence_length: Annotated[int, Field(ge=0, le=512)] = 256
    """T5 tokens a prompt. 0 leaves T5 out."""
    attention: str = "native"
    """native, xformers, or (Flux) any attention backend of diffusers."""
    gradient_checkpointing: bool = False
    lora: Lora = field(default_factory=Lora)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, side in (("height", self.height), ("width", self.width)):
            if side % 16:
                raise WrongSetting(
                    f"{name} is {side}; it must be a multiple of 16, the nearest is {max(1, round(side / 16)) * 16}."
                )
        if self.name == "flux" and not self.max_sequence_length:
            raise WrongSetting(
                "max_sequence_length is 0, but Flux reads its prompts by T5; write 1 to 512."
            )
        if self.attention not in ATTENTION[self.name]:
            known, near = (
                ", ".join(ATTENTION[self.name]),
                did_you_mean(self.attention, ATTENTION[self.name]),
            )
            raise WrongSetting(f"attention is {self.attention!r}; choose from {known}.{near}")
