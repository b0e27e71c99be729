"""Write assets/published/: the configuration files of published models, for plans without a hub.

    python scripts/make_published.py

Sizes are those of the models' cards and of diffusers' conversion scripts; the number of parameters
of each network is compared with the published one. Tokenizers are small ones of the same class:
a plan needs the number of tokens, not the tokens.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from scripts import small_tokenizers

FOLDER = Path(__file__).parents[1] / "assets" / "published"
MILLION = 1e6


@dataclass(frozen=True)
class Network:
    """A network of a pipeline."""

    name: str
    """Class in diffusers or transformers."""
    settings: Mapping[str, Any]
    """What differs from the class's own defaults."""
    millions: float | None = None
    """Published number of parameters, as far as it is known."""
    config: str = ""
    """Class of the configuration, for networks of transformers."""


@dataclass(frozen=True)
class Model:
    """A published pipeline."""

    pipeline: str
    networks: Mapping[str, Network]
    tokenizers: Mapping[str, Any]
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further entries of model_index.json."""
    scheduler_name: str = "FlowMatchEulerDiscreteScheduler"
    """Class of the scheduler."""


VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
SD3_VAE = Network("AutoencoderKL", VAE | {"scaling_factor": 1.5305, "shift_factor": 0.0609}, 83.82)
FLUX_VAE = Network("AutoencoderKL", VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159}, 83.82)
CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
CLIP_G = CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "is_gated_act": True,
    "tie_word_embeddings": False,
}
T5 = Network("T5EncoderModel", T5_XXL, 4762.31, "T5Config")


def clip(settings: Mapping[str, Any], projected: bool) -> Network:
    """Return a text encoder of CLIP."""
    name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    return Network(name, settings, config="CLIPTextConfig")


def qwen3(name: str, width: int, inner: int, tied: bool, millions: float) -> Network:
    """Return a text encoder of Qwen3, of 4 or 8 billion parameters."""
    sizes = {
        "vocab_size": 151936,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": tied,
    }
    return Network(name, sizes, millions, "Qwen3Config")


def stable_diffusion_3(transformer: Mapping[str, Any], millions: float) -> Model:
    """Return a model of SD3.5."""
    shared = {
        "sample_size": 128,
        "in_channels": 16,
        "out_channels": 16,
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "qk_norm": "rms_norm",
    }
    networks = {
        "transformer": Network("SD3Transformer2DModel", shared | transformer, millions),
        "vae": SD3_VAE,
        "text_encoder": clip(CLIP_L, projected=True),
        "text_encoder_2": clip(CLIP_G, projected=True),
        "text_encoder_3": T5,
    }
    tokenizers = {
        "tokenizer": small_tokenizers.clip(),
        "tokenizer_2": small_tokenizers.clip(),
        "tokenizer_3": small_tokenizers.t5(),
    }
    return Model("StableDiffusion3Pipeline", networks, tokenizers, {"shift": 3.0})


def flux2_klein(
    blocks: tuple[int, int], heads: int, encoder: Network, millions: float, distilled: bool = False
) -> Model:
    """Return a model of FLUX.2 klein."""
    transformer = flux2_transformer(blocks, heads, 3 * encoder.settings["hidden_size"])
    networks = {
        "transformer": Network("Flux2Transformer2DModel", transformer, millions),
        "vae": Network("AutoencoderKLFlux2", {}),
        "text_encoder": encoder,
    }
    scheduler = {"shift": 3.0, "use_dynamic_shifting": True}
    tokenizers = {"tokenizer": small_tokenizers.qwen()}
    extra = {"is_distilled": distilled}
    return Model("Flux2KleinPipeline", networks, tokenizers, scheduler, extra)


def flux2_transformer(blocks: tuple[int, int], heads: int, text_width: int) -> dict[str, Any]:
    """Return the settings of a transformer of FLUX.2 without embedded guidance."""
    return {
        "num_layers": blocks[0],
        "num_single_layers": blocks[1],
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "joint_attention_dim": text_width,
        "guidance_embeds": False,
    }


def sana(transformer: Mapping[str, Any], millions: float) -> Model:
    """Return a model of SANA with 1.6 billion parameters."""
    networks = {
        "transformer": Network("SanaTransformer2DModel", transformer, millions),
        "vae": Network("AutoencoderDC", DEEP_VAE, 312.25),
        "text_encoder": Network("Gemma2Model", GEMMA2_2B, 2614.34, "Gemma2Config"),
    }
    scheduler = {
        "flow_shift": 3.0,
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
    }
    tokenizers = {"tokenizer": small_tokenizers.gemma()}
    name = "DPMSolverMultistepScheduler"
    return Model("SanaPipeline", networks, tokenizers, scheduler, scheduler_name=name)


GEMMA2_2B = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}
DEEP_VAE = {
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
QWEN3_4B = qwen3("Qwen3ForCausalLM", 2560, 9728, tied=True, millions=4022.47)
QWEN3_8B = qwen3("Qwen3ForCausalLM", 4096, 12288, tied=False, millions=8190.74)
MISTRAL_24B = Network(
    "Mistral3ForConditionalGeneration",
    {
        "text_config": {
            "model_type": "mistral",
            "vocab_size": 131072,
            "hidden_size": 5120,
            "intermediate_size": 32768,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 131072,
        },
        "vision_config": {"model_type": "pixtral", "image_size": 1540, "patch_size": 14},
    },
    config="Mistral3Config",
)
QWEN_VL = Network(
    "Qwen2_5_VLForConditionalGeneration",
    {
        "text_config": {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128000,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [16, 24, 24],
                "rope_theta": 1e6,
            },
        },
        "vision_config": {"hidden_size": 1280, "out_hidden_size": 3584, "intermediate_size": 3420},
    },
    8292.17,
    "Qwen2_5_VLConfig",
)
QWEN3_VL = Network(
    "Qwen3VLForConditionalGeneration",
    {
        "text_config": {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
                "rope_theta": 5e6,
            },
        },
        "vision_config": {"out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24]},
    },
    8767.12,
    "Qwen3VLConfig",
)
QWEN_TIMES = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}
TURBO_TIMES = [1.0, 0.978453, 0.95418, 0.926626, 0.89508, 0.845148, 0.704534, 0.414568]
QWEN_LATENTS = {
    "latents_mean": [
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    ],
    "latents_std": [
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916),
    ],
}
MODELS: dict[str, Model] = {
    "stabilityai/stable-diffusion-3.5-medium": stable_diffusion_3(
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": list(range(13)),
        },
        2243.17,
    ),
    "black-forest-labs/FLUX.1-dev": Model(
        "FluxPipeline",
        {
            "transformer": Network(
                "FluxTransformer2DModel",
                {
                    "num_layers": 19,
                    "num_single_layers": 38,
                    "attention_head_dim": 128,
                    "num_attention_heads": 24,
                    "joint_attention_dim": 4096,
                    "pooled_projection_dim": 768,
                    "guidance_embeds": True,
                },
                11901.41,
            ),
            "vae": FLUX_VAE,
            "text_encoder": clip(CLIP_L, projected=False),
            "text_encoder_2": T5,
        },
        {"tokenizer": small_tokenizers.clip(), "tokenizer_2": small_tokenizers.t5()},
        {"shift": 3.0, "use_dynamic_shifting": True},
    ),
    "black-forest-labs/FLUX.2-klein-base-4B": flux2_klein((5, 20), 24, QWEN3_4B, 3875.5),
    "black-forest-labs/FLUX.2-klein-4B": flux2_klein((5, 20), 24, QWEN3_4B, 3875.5, distilled=True),
    "black-forest-labs/FLUX.2-klein-base-9B": flux2_klein((8, 24), 32, QWEN3_8B, 9078.6),
    "black-forest-labs/FLUX.2-dev": Model(
        "Flux2Pipeline",
        {
            "transformer": Network(
                "Flux2Transformer2DModel",
                flux2_transformer((8, 48), 48, 15360) | {"guidance_embeds": True},
                32223,
            ),
            "vae": Network("AutoencoderKLFlux2", {}),
            "text_encoder": MISTRAL_24B,
        },
        {"tokenizer": small_tokenizers.pixtral()},
        {"shift": 3.0, "use_dynamic_shifting": True},
    ),
    **{
        f"Tongyi-MAI/{name}": Model(
            "ZImagePipeline",
            {
                "transformer": Network("ZImageTransformer2DModel", {}, 6154.9),
                "vae": FLUX_VAE,
                "text_encoder": qwen3("Qwen3Model", 2560, 9728, tied=True, millions=4022.47),
            },
            {"tokenizer": small_tokenizers.qwen()},
            {"shift": shift},
        )
        for name, shift in {"Z-Image": 6.0, "Z-Image-Turbo": 3.0}.items()
    },
    "Qwen/Qwen-Image-2512": Model(
        "QwenImagePipeline",
        {
            "transformer": Network("QwenImageTransformer2DModel", {}, 20430.4),
            "vae": Network("AutoencoderKLQwenImage", QWEN_LATENTS),
            "text_encoder": QWEN_VL,
        },
        {"tokenizer": small_tokenizers.qwen()},
        QWEN_TIMES,
    ),
    **{
        f"Qwen/{name}": Model(
            "QwenImage21Pipeline",
            {
                "transformer": Network("QwenImage21Transformer2DModel", {}, 7115.1),
                "vae": Network("AutoencoderKLQwenImage21", {}),
                "text_encoder": QWEN3_VL,
            },
            {"processor": small_tokenizers.qwen3_vl()},
            scheduler,
            {"sample_sigmas": times},
        )
        for name, scheduler, times in (
            ("Qwen-Image-2.1", QWEN_TIMES, None),
            ("Qwen-Image-2.1-Turbo", {}, TURBO_TIMES),
        )
    },
    **{
        f"Efficient-Large-Model/{name}_diffusers": sana(transformer, 1604.5)
        for name, transformer in {
            "Sana_1600M_512px": {"sample_size": 16},
            "Sana_1600M_1024px_BF16": {},
            "SANA1.5_1.6B_1024px": {"qk_norm": "rms_norm_across_heads"},
        }.items()
    },
}
"""Models by repository."""


def write_network(network: Network, folder: Path) -> list[str]:
    """Write config.json, and return the network's entry of model_index.json."""
    with torch.device("meta"):
        if network.config:
            config = getattr(transformers, network.config)(**network.settings)
            built: nn.Module = getattr(transformers, network.name)(config)
            config.architectures = [network.name]
            config.save_pretrained(folder)
        else:
            built = getattr(diffusers, network.name)(**network.settings)
            built.save_config(folder)
    count = sum(parameter.numel() for parameter in built.parameters()) / MILLION
    print(f"  {folder.name:16} {count:12,.2f} M")
    if network.millions and abs(count / network.millions - 1) > 1e-3:
        raise SystemExit(f"{network.name} has {count:.2f} M parameters, not {network.millions}.")
    return ["transformers" if network.config else "diffusers", network.name]


def write_model(name: str, model: Model) -> None:
    """Write the folder of a model, without weights."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(name)
    index: dict[str, Any] = {"_class_name": model.pipeline, **model.extra}
    for part, network in model.networks.items():
        index[part] = write_network(network, folder / part)
    for part, tokenizer in model.tokenizers.items():
        tokenizer.save_pretrained(folder / part)
        index[part] = ["transformers", type(tokenizer).__name__]
    scheduler = getattr(diffusers, model.scheduler_name)(**model.scheduler)
    scheduler.save_config(folder / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    pipeline = getattr(diffusers, model.pipeline)
    for part in pipeline._optional_components:
        index.setdefault(part, [None, None])
    (folder / pipeline.config_name).write_text(json.dumps(index, indent=2) + "\n")


def main() -> None:
    """Write all models."""
    for name, model in MODELS.items():
        write_model(name, model)


if __name__ == "__main__":
    main()
