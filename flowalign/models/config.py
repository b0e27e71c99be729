"""The `model` section of a YAML file, as far as it is the same for every model family."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from flowalign.errors import did_you_mean
from flowalign.settings.types import Count, NonNegative, Settings, WrongSetting

Dtype = Literal["float32", "bfloat16", "float16"]
Quantize = Literal["none", "int8", "fp8", "nf4"]
Rank = Annotated[int, Field(ge=1, le=4096)]
Side = Annotated[int, Field(ge=16, le=4096)]


@dataclass
class Lora(Settings):
    """A low-rank adapter (arXiv 2106.09685) on linear layers of the transformer, in float32."""

    rank: Rank = 32
    """Inner dimension of the two matrices of every adapted layer."""
    alpha: Count = 64
    """The output of the adapter is scaled by alpha / rank."""
    targets: list[str] = field(default_factory=list)
    """Endings of the names of the adapted layers. An empty list means the family's own choice."""
    init: Literal["default", "gaussian"] = "gaussian"
    """How PEFT initialises the first matrix. The second one starts at zero in both cases."""
    use_rslora: bool = False
    """Scale by alpha over the square root of the rank (rsLoRA, arXiv 2312.03732)."""
    use_dora: bool = False
    """Train the length of each row of a weight apart from its direction (DoRA, arXiv 2402.09353).

    Each call of a layer then computes the whole weight, which costs time and memory.
    """
    rank_pattern: dict[str, Rank] = field(default_factory=dict)
    """Ranks of layers that differ, by an ending of their names or a regular expression for one."""
    alpha_pattern: dict[str, Count] = field(default_factory=dict)
    """Values of alpha of layers that differ, likewise."""


@dataclass(kw_only=True)
class ModelConfig(Settings):
    """Settings that every model family has. A family adds its own in a subclass."""

    embeds_guidance: ClassVar[bool] = False
    """True if models of the family can take `sampler.embedded_guidance` as an input."""
    default_guidance: ClassVar[float] = 1.0
    """Guidance scale for pictures of a model that comes without a run."""
    side_step: ClassVar[int] = 16
    """Height and width are multiples of this many pixels."""

    name: str = ""
    """A built-in family, an alias, or my_family.py:MyModel. By default read from the model."""
    path: str
    """A local folder in diffusers' layout, or a repository on the Hugging Face hub."""
    revision: str | None = None
    """Branch, tag or commit of the repository."""
    dtype: Dtype = "float32"
    """Dtype of transformer and text encoders. Latents and the autoencoder stay in float32.

    So do the weights of adapters, which are multiplied in this dtype.
    """
    height: Side = 512
    """Height of the pictures in pixels."""
    width: Side = 512
    """Width of the pictures in pixels."""
    attention: str = "native"
    """Attention back end: native is PyTorch's; others depend on the family."""
    gradient_checkpointing: bool = False
    """Recompute the blocks of the transformer in the backward pass, which saves memory."""
    compile: bool = False
    """Compile the blocks of the transformer, which takes minutes at the start of a run."""
    quantize: Quantize = "none"
    """Bits of the frozen weights of transformer and text encoders: 8 with int8 and fp8, 4 with nf4.

    Products are computed in `dtype`. Adapters keep float32 weights.
    """
    offload: bool = False
    """Keep the blocks of the transformer in main memory. Each layer is copied whenever it computes.

    Results are the same to the last bit.
    """
    text_cache_gb: NonNegative = 0.0
    """Gigabytes of prompt embeddings that are kept on disk between runs; 0 for none."""
    keep_text_encoders: bool = False
    """Leave the text encoders on the device after they encoded. By default they come and go."""
    lora: Lora = field(default_factory=Lora)
    """The adapter that trains."""
    adapter: str = ""
    """A LoRA that the adapter begins as: a file or folder in diffusers', PEFT's or kohya's format.

    The reference stays the model without it.
    """
    merge: list[str] = field(default_factory=list)
    """LoRAs that are added to the model's weights first, so that the reference has them too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, side in (("height", self.height), ("width", self.width)):
            if side % self.side_step:
                nearest = max(1, round(side / self.side_step)) * self.side_step
                raise WrongSetting(
                    f"{name} is {side}, but it must be a multiple of {self.side_step}. "
                    f"Set it to {nearest}."
                )
        if self.compile and (self.quantize != "none" or self.offload):
            raise WrongSetting(
                "compile is true, but compiled blocks would keep whole copies of weights that "
                "quantize and offload store elsewhere. Set compile to false, or leave out the two."
            )
        if self.compile and self.lora.use_dora:
            raise WrongSetting(
                "compile is true, but adapters of DoRA are not compiled. Set compile to false, or "
                "lora.use_dora to false."
            )
        # Back ends of diffusers are listed by importing it, so the default must not ask for them.
        if self.attention != "native":
            names = self.attention_names()
            if self.attention not in names:
                hint = did_you_mean(self.attention, names)
                raise WrongSetting(
                    f"attention is {self.attention!r}; choose from {', '.join(names)}.{hint}"
                )

    @property
    def precision(self) -> str:
        """The dtype, and the format of the frozen weights if it is another one, for people."""
        return self.dtype if self.quantize == "none" else f"{self.dtype}, {self.quantize} weights"

    @classmethod
    def attention_names(cls) -> Sequence[str]:
        """Return the attention back ends that the family can switch to."""
        return ["native"]
