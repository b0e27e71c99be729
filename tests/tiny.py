"""Small real models and policies for the tests."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from flowalign.batch import Keys
from flowalign.config.load import load_config
from flowalign.data.prompts import Prompt
from flowalign.models import load_model
from flowalign.models.base import FlowModel
from flowalign.models.config import Lora
from flowalign.models.flux import FluxConfig
from flowalign.models.flux2 import Flux2DevConfig, Flux2KleinConfig
from flowalign.models.qwen_image import QwenImageConfig
from flowalign.models.qwen_image21 import QwenImage21Config
from flowalign.models.sana import SanaConfig
from flowalign.models.sd3 import SD3Config
from flowalign.models.z_image import ZImageConfig
from flowalign.policy import Policy, Sampler
from flowalign.rollouts.collect import make_prompts
from scripts import small_tokenizers

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "tiny" / "flow_grpo.yaml"
TEXTS = ["a red circle", "a circle and a square"]
SMALL = [
    *(
        "train.steps=2",
        "train.prompts_per_step=2",
        "train.images_per_prompt=3",
        "train.images_per_pass=6",
    ),
    *(
        "sampler.steps=4",
        "sampler.window.range=[0, 2]",
        "evaluation.sampler.steps=4",
        "evaluation.prompts=tests/prompts.jsonl",
        "evaluation.images_per_prompt=1",
        "evaluation.guidance_sweep=[]",
        "train.evaluate_every=0",
    ),
]
"""Overrides under which the quick start takes seconds."""


def sd3_config(**changes: Any) -> SD3Config:
    settings = {
        "path": str(ROOT / "assets" / "tiny-sd3"),
        "height": 64,
        "width": 64,
        "max_sequence_length": 0,
    }
    return SD3Config(**{**settings, "lora": Lora(rank=4, alpha=12), **changes})


def make_policy(
    sampler: Sampler | None = None, snapshots: list[str] | None = None, **changes: Any
) -> Policy:
    """A policy on the bundled SD3, from a fixed seed."""
    torch.manual_seed(0)
    return Policy(load_model(sd3_config(**changes)), sampler or Sampler(steps=4), snapshots)


def stir(policy: Policy, name: str = "policy", size: float = 0.05) -> None:
    """Move an adapter away from its start, where it changes nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters(name):
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


@contextmanager
def kept_storages(parameters: Iterable[Tensor] = ()) -> Iterator[dict[int, int]]:
    """The bytes of each storage that the backward pass of the block's results needs.

    Those of `parameters` do not count.
    """
    storages: dict[int, int] = {}
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    # The tensors are held, so that no address is used twice.
    held = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


def two_groups(policy: Policy, images: int = 3) -> Any:
    """Prompts of two groups."""
    members = [(slot, image) for slot in range(2) for image in range(images)]
    return make_prompts(
        policy,
        [Prompt(TEXTS[slot]) for slot, _ in members],
        Keys.training(0, 0, members),
    )


def random_clip() -> tuple[CLIPTokenizer, CLIPTextConfig]:
    """A tokenizer of letters, and the configuration of a CLIP text encoder that fits it."""
    tokenizer = small_tokenizers.clip(length=12)
    special = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=12, projection_dim=16, **sizes, **special
    )
    return tokenizer, config


def random_t5() -> tuple[T5Tokenizer, T5EncoderModel]:
    tokenizer = small_tokenizers.t5(length=16)
    t5 = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=40, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    ).eval()
    return tokenizer, t5


def random_sd35(folder: Path) -> FlowModel:
    """A small SD3.5-medium with random weights.

    It has T5, dual attention in some layers, query-key norm, and a shift of times of 3.
    """
    torch.manual_seed(0)
    tokenizer, config = random_clip()
    t5_tokenizer, t5 = random_t5()
    encoders = [CLIPTextModelWithProjection(config).eval() for _ in range(2)]
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=40,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    vae = AutoencoderKL.from_pretrained(ROOT / "assets" / "tiny-sd3" / "vae")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = (
        transformer,
        scheduler,
        vae,
        encoders[0],
        tokenizer,
        encoders[1],
        tokenizer,
        t5,
        t5_tokenizer,
    )
    StableDiffusion3Pipeline(*parts).save_pretrained(folder)
    return load_model(
        SD3Config(
            path=str(folder),
            height=64,
            width=64,
            max_sequence_length=16,
            lora=Lora(rank=2, alpha=6),
        )
    )


def random_flux(folder: Path, guidance_embeds: bool) -> FlowModel:
    """A small Flux with random weights, like dev or like schnell, saved and loaded again."""
    torch.manual_seed(0)
    tokenizer, config = random_clip()
    t5_tokenizer, t5 = random_t5()
    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        AutoencoderKL.from_pretrained(ROOT / "assets" / "tiny-sd3" / "vae"),
        CLIPTextModel(config).eval(),
        tokenizer,
        t5,
        t5_tokenizer,
        FluxTransformer2DModel(
            in_channels=32,
            num_layers=1,
            num_single_layers=1,
            num_attention_heads=2,
            attention_head_dim=16,
            axes_dims_rope=(4, 6, 6),
            joint_attention_dim=40,
            pooled_projection_dim=16,
            guidance_embeds=guidance_embeds,
        ),
    )
    pipe.save_pretrained(folder)
    return load_model(
        FluxConfig(
            path=str(folder),
            height=64,
            width=64,
            max_sequence_length=16,
            lora=Lora(rank=2, alpha=6),
        )
    )


def text_sizes(vocabulary: int, layers: int) -> dict[str, Any]:
    """The sizes of a small language model."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 1024,
    }


def random_flux2(folder: Path, is_distilled: bool = False) -> FlowModel:
    """A small FLUX.2 klein with random weights, base or distilled, saved and loaded again."""
    torch.manual_seed(0)
    tokenizer = small_tokenizers.qwen()
    # The hidden states of layers 9, 18 and 27 are read, the last before the final norm.
    encoder = Qwen3ForCausalLM(
        Qwen3Config(
            **text_sizes(len(tokenizer), layers=28),
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        )
    ).eval()
    pipe = Flux2KleinPipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        random_flux2_vae(),
        encoder,
        tokenizer,
        random_flux2_transformer(guidance_embeds=False),
        is_distilled=is_distilled,
    )
    pipe.save_pretrained(folder)
    return load_model(Flux2KleinConfig(path=str(folder), **FLUX2_SETTINGS))


SMALL_AUTOENCODER: Any = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 64,
}
SMALL_DEEP_AUTOENCODER: Any = {
    "latent_channels": 4,
    "attention_head_dim": 4,
    "encoder_block_types": ("ResBlock",) * 5 + ("EfficientViTBlock",),
    "decoder_block_types": ("ResBlock",) * 5 + ("EfficientViTBlock",),
    "encoder_block_out_channels": (8,) * 6,
    "decoder_block_out_channels": (8,) * 6,
    "encoder_layers_per_block": (1,) * 6,
    "decoder_layers_per_block": (1,) * 6,
    "encoder_qkv_multiscales": ((),) * 5 + ((5,),),
    "decoder_qkv_multiscales": ((),) * 5 + ((5,),),
    "scaling_factor": 0.41407,
}
FLUX2_SETTINGS: Any = {
    "height": 64,
    "width": 64,
    "max_sequence_length": 40,
    "lora": Lora(rank=2, alpha=6),
}


def random_flux2_transformer(guidance_embeds: bool) -> Flux2Transformer2DModel:
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=96,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    return shaken(transformer)


def random_flux2_vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        **SMALL_AUTOENCODER,
    ).eval()
    # Statistics of 0 and 1 would hide a mistake.
    vae.bn.running_mean.normal_(0, 0.3)
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def shaken(network: Any) -> Any:
    """Move all parameters a little: gates and gains begin at 0 or 1, which hides mistakes."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def random_flux2_dev(folder: Path) -> FlowModel:
    """A small FLUX.2 dev with random weights, saved and loaded again."""
    torch.manual_seed(0)
    processor = small_tokenizers.pixtral()
    tokenizer = processor.tokenizer
    encoder = Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config={"model_type": "mistral", **text_sizes(len(tokenizer), layers=31)},
            vision_config={
                "model_type": "pixtral",
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "head_dim": 8,
                "image_size": 56,
                "patch_size": 14,
            },
            image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        )
    ).eval()
    pipe = Flux2Pipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        random_flux2_vae(),
        encoder,
        processor,
        random_flux2_transformer(guidance_embeds=True),
    )
    pipe.save_pretrained(folder)
    return load_model(Flux2DevConfig(path=str(folder), **FLUX2_SETTINGS))


def random_z_image(folder: Path, shift: float = 6.0) -> FlowModel:
    """A small Z-Image with random weights and the shift of the base or of Turbo."""
    torch.manual_seed(0)
    tokenizer = small_tokenizers.qwen()
    encoder = Qwen3Model(Qwen3Config(**text_sizes(len(tokenizer), layers=3))).eval()
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 64, 64],
    )
    vae = AutoencoderKL(
        **SMALL_AUTOENCODER,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    pipe = ZImagePipeline(scheduler, vae, encoder, tokenizer, shaken(transformer))
    pipe.save_pretrained(folder)
    return load_model(
        ZImageConfig(
            path=str(folder),
            height=64,
            width=64,
            max_sequence_length=64,
            lora=Lora(rank=2, alpha=6),
        )
    )


def random_qwen_image(folder: Path) -> FlowModel:
    """A small Qwen-Image with random weights."""
    torch.manual_seed(0)
    tokenizer = small_tokenizers.qwen()
    number = tokenizer.convert_tokens_to_ids
    text = {
        **text_sizes(len(tokenizer), layers=2),
        "max_position_embeddings": 2048,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [2, 3, 3],
            "rope_theta": 1e6,
        },
    }
    del text["head_dim"]
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [0],
        "window_size": 28,
    }
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=number("<|image_pad|>"),
            video_token_id=number("<|video_pad|>"),
            vision_start_token_id=number("<|vision_start|>"),
            vision_end_token_id=number("<|vision_end|>"),
        )
    ).eval()
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.8, 1.1, 1.3, 0.9],
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        max_image_seq_len=8192,
        shift_terminal=0.02,
    )
    pipe = QwenImagePipeline(scheduler, vae, encoder, tokenizer, shaken(transformer))
    pipe.save_pretrained(folder)
    return load_model(
        QwenImageConfig(
            path=str(folder),
            height=64,
            width=64,
            max_sequence_length=32,
            lora=Lora(rank=2, alpha=6),
        )
    )


def random_qwen_image21(folder: Path, times: list[float] | None = None) -> FlowModel:
    """A small Qwen-Image 2.1 with random weights; like Turbo with times of its own."""
    torch.manual_seed(0)
    processor = small_tokenizers.qwen3_vl()
    number = processor.tokenizer.convert_tokens_to_ids
    text = {
        **text_sizes(len(processor.tokenizer), layers=2),
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
            "rope_theta": 5e6,
        },
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }
    encoder = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=number("<|image_pad|>"),
            video_token_id=number("<|video_pad|>"),
            vision_start_token_id=number("<|vision_start|>"),
            vision_end_token_id=number("<|vision_end|>"),
        )
    ).eval()
    transformer = QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKLQwenImage21(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 2, 2, 2],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.8, 1.1, 1.3, 0.9],
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        max_image_seq_len=8192,
        shift_terminal=0.02,
    )
    parts = scheduler, vae, shaken(encoder), processor, shaken(transformer)
    pipe = QwenImage21Pipeline(*parts, sample_sigmas=times)
    pipe.save_pretrained(folder)
    return load_model(
        QwenImage21Config(
            path=str(folder),
            height=64,
            width=64,
            max_sequence_length=32,
            lora=Lora(rank=2, alpha=6),
        )
    )


def random_sana(folder: Path, qk_norm: str | None = "rms_norm_across_heads") -> FlowModel:
    """A small SANA 1.5 with random weights; SANA without query-key norm."""
    torch.manual_seed(0)
    tokenizer = small_tokenizers.gemma()
    text = {**text_sizes(len(tokenizer), layers=2), "sliding_window": 512}
    encoder = Gemma2Model(Gemma2Config(**text)).eval()
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=32,
        sample_size=16,
        qk_norm=qk_norm,
    )
    vae = AutoencoderDC(**SMALL_DEEP_AUTOENCODER).eval()
    # The published scheduler, whose steps are of second order.
    scheduler = DPMSolverMultistepScheduler(
        flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    pipe = SanaPipeline(tokenizer, encoder, vae, shaken(transformer), scheduler)
    pipe.save_pretrained(folder)
    return load_model(
        SanaConfig(
            path=str(folder),
            height=64,
            width=64,
            max_sequence_length=32,
            lora=Lora(rank=2, alpha=6),
        )
    )


def small_config(output: Path, *overrides: str) -> Any:
    """The quick start's configuration, made small."""
    return load_config(TINY, [*SMALL, f"output={output}", *overrides])
