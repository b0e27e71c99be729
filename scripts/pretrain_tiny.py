"""Make the bundled models, assets/tiny-{sd3,flux,clip}, from nothing: python scripts/pretrain_tiny.py [STAGE ...]

Stages in order: vae, sd3, flux, clip. Each trains on pictures from `flowalign.scenes` and saves what it has every few
minutes. `python scripts/pretrain_gates.py` then measures the result and writes docs/bundled-models.md.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.training_utils import EMAModel
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import BpeTrainer
from torch import nn, Tensor
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from flowalign.worlds import scenes

ASSETS = Path(__file__).parent.parent / "assets"
SEED = 0
MISQUOTED = 0.3
"""Share of captions that are wrong in one fact, as captions on the web are: the models know how to draw what is
asked, and do not always prefer to. Preference is what alignment repairs."""
EMPTY = 0.1
LATENT_CHANNELS = 8
TOKENS = 10
"""The longest caption has eight words."""
BATCH = 64
SD3_STEPS, FLUX_STEPS = 10_000, 10_000


def forget_places(folder: Path) -> None:
    """Take out of the saved configurations where on this machine their parts were loaded from."""
    for file in folder.rglob("config.json"):
        config = json.loads(file.read_text())
        if config.pop("_name_or_path", None):
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    stages: dict[str, Callable[[float], None]] = {
        "vae": train_vae,
        "sd3": train_sd3,
        "flux": train_flux,
        "clip": train_clip,
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "stages", nargs="*", metavar="STAGE", help=f"of {', '.join(stages)}; all by default"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of training steps")
    options = parser.parse_args()
    if unknown := set(options.stages) - set(stages):
        parser.error(f"unknown stage {unknown.pop()!r}; choose from {', '.join(stages)}")
    for name in options.stages or stages:
        stages[name](options.scale)


def draw_pictures(
    count: int, seed: int
) -> tuple[list[scenes.Caption], list[scenes.Caption], Tensor]:
    """True captions, captions as quoted (some wrong), and pictures (count, 3, 64, 64) as bytes."""
    rng = np.random.default_rng(seed)
    truth = [scenes.draw_caption(rng) for _ in range(count)]
    quoted = [scenes.misquote(c, rng) if rng.random() < MISQUOTED else c for c in truth]
    drawn = [scenes.draw_scene(caption, rng) for caption in truth]
    pictures = [
        (scenes.render(drawn[i : i + 500]) * 255).round().byte() for i in range(0, count, 500)
    ]
    return truth, quoted, torch.cat(pictures)


class Progress:
    """Prints the loss and the time, and calls `save`, now and then."""

    def __init__(self, name: str, steps: int, save: Callable[[], None]):
        self.name, self.steps, self.save = name, steps, save
        self.began, self.losses = time.monotonic(), []

    def __call__(self, step: int, loss: Tensor) -> None:
        self.losses.append(loss.detach())
        if (step + 1) % 100 == 0 or step + 1 == self.steps:
            mean = torch.stack(self.losses).mean().item()
            print(
                f"{self.name} {step + 1}/{self.steps}  loss {mean:.4f}  {time.monotonic() - self.began:.0f} s",
                flush=True,
            )
            self.losses.clear()
        if (step + 1) % 1000 == 0 or step + 1 == self.steps:
            self.save()


def cosine(
    optimizer: torch.optim.Optimizer, steps: int, warmup: int = 100
) -> torch.optim.lr_scheduler.LambdaLR:
    def factor(step: int) -> float:
        return min(1, (step + 1) / warmup) * (
            0.01 + 0.99 * (1 + math.cos(math.pi * min(1, step / steps))) / 2
        )

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Indices in a new order each time round, forever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).split(size)[: count // size]


def train_vae(scale: float) -> None:
    """An autoencoder whose latents stay decodable under noise, so that a sampler's last errors do not show."""
    torch.manual_seed(SEED)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 64),
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=scenes.SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).to(memory_format=torch.channels_last)
    _, _, pictures = draw_pictures(20_000, SEED)
    steps = int(2400 * scale)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, weight_decay=1e-3)
    schedule = cosine(optimizer, steps)

    def save() -> None:
        with torch.no_grad():
            latents = torch.cat(
                [
                    vae.encode(p.float() / 127.5 - 1).latent_dist.mean
                    for p in pictures[:2000].split(100)
                ]
            )
        vae.register_to_config(
            scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item()
        )
        vae.save_pretrained(ASSETS / "tiny-sd3" / "vae")
        forget_places(ASSETS / "tiny-sd3")

    progress = Progress("vae", steps, save)
    for step, index in zip(range(steps), batches(len(pictures), 32, SEED), strict=False):
        x = (pictures[index].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        z = posterior.sample()
        z = z + 0.3 * torch.rand(len(z), 1, 1, 1) * torch.randn_like(z)
        error = vae.decode(z).sample - x
        loss = error.abs().mean() + error.square().mean() + 2e-5 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress(step, loss)


def caption_words() -> list[str]:
    return sorted(
        {word for kind in scenes.KINDS for c in scenes.captions(kind) for word in c.text.split()}
    )


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-pair tokens in CLIP's format, one for every word of the captions."""
    words = caption_words()
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = Whitespace()
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    bpe.train_from_iterator(
        words,
        BpeTrainer(
            vocab_size=1000,
            initial_alphabet=letters,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    state = json.loads(bpe.to_str())["model"]
    special = ["<|startoftext|>", "<|endoftext|>"]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *state["vocab"]]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *special]))}
    tokenizer = CLIPTokenizer(
        vocab=vocabulary, merges=[tuple(pair) for pair in state["merges"]], model_max_length=TOKENS
    )
    assert all(len(tokenizer(word).input_ids) == 3 for word in words)
    return tokenizer


def clip_text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def load_vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(ASSETS / "tiny-sd3" / "vae").requires_grad_(False)


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Normalised latents of byte pictures."""
    latents = torch.cat(
        [vae.encode(p.float() / 127.5 - 1).latent_dist.mean for p in pictures.split(100)]
    )
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def train_flow(
    name: str,
    modules: nn.Module,
    velocity: Callable[..., Tensor],
    save: Callable[[], None],
    steps: int,
) -> None:
    """Flow matching: the mean square of velocity(xt, t, captions) - (noise - x0), times drawn evenly."""
    _, quoted, pictures = draw_pictures(40_000, SEED + 1)
    bank = encode(load_vae(), pictures)
    ema = EMAModel(modules.parameters(), decay=0.9995, use_ema_warmup=True, power=0.8)
    optimizer = torch.optim.AdamW(
        modules.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01
    )
    schedule = cosine(optimizer, steps)

    def save_average() -> None:
        ema.store(modules.parameters())
        ema.copy_to(modules.parameters())
        save()
        ema.restore(modules.parameters())

    progress = Progress(name, steps, save_average)
    generator = torch.Generator().manual_seed(SEED)
    for step, index in zip(range(steps), batches(len(bank), BATCH, SEED), strict=False):
        x0, texts = bank[index], [quoted[i].text for i in index]
        empty = torch.rand(BATCH, generator=generator) < EMPTY
        texts = ["" if e else text for e, text in zip(empty, texts, strict=True)]
        t = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
        noise = torch.randn(x0.shape, generator=generator)
        xt = torch.lerp(x0, noise, t.view(-1, 1, 1, 1))
        with torch.autocast("cpu", torch.bfloat16):
            v = velocity(xt, t, texts)
        loss = (v.float() - (noise - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.step(modules.parameters())
        progress(step, loss)


@torch.no_grad()
def score(
    pipe: DiffusionPipeline, guidance: float, sequence: int = 0, count: int = 300
) -> dict[str, float]:
    """Strict score by kind and overall, of pictures the diffusers pipeline makes in ten steps."""
    rng = np.random.default_rng(SEED + 2)
    captions = [
        scenes.draw_caption(rng, kind)
        for kind in scenes.KINDS
        for _ in range(count // len(scenes.KINDS))
    ]
    pipe.set_progress_bar_config(disable=True)
    pictures = pipe(
        [caption.text for caption in captions],
        num_inference_steps=10,
        guidance_scale=guidance,
        height=scenes.SIZE,
        width=scenes.SIZE,
        max_sequence_length=sequence,
        generator=torch.Generator().manual_seed(SEED),
        output_type="pt",
    ).images
    right = [
        scenes.match(c, scenes.read_picture(p)).strict
        for c, p in zip(captions, pictures, strict=True)
    ]
    by_kind = {
        kind: float(np.mean([r for c, r in zip(captions, right, strict=True) if c.kind == kind]))
        for kind in scenes.KINDS
    }
    return by_kind | {"overall": float(np.mean(right))}


def train_sd3(scale: float) -> None:
    torch.manual_seed(SEED)
    tokenizer = clip_tokenizer()
    encoders = [CLIPTextModelWithProjection(clip_text_config(tokenizer)) for _ in range(2)]
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=5,
        num_attention_heads=4,
        attention_head_dim=32,
        joint_attention_dim=128,
        caption_projection_dim=128,
        pooled_projection_dim=128,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    modules = nn.ModuleList([transformer, *encoders])
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=load_vae(),
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
    )

    def velocity(xt: Tensor, t: Tensor, texts: list[str]) -> Tensor:
        embeds, _, pooled, _ = pipe.encode_prompt(
            texts, texts, texts, do_classifier_free_guidance=False, max_sequence_length=0
        )
        return transformer(xt, embeds, pooled, 1000 * t, return_dict=False)[0]

    def save() -> None:
        pipe.save_pretrained(ASSETS / "tiny-sd3")
        forget_places(ASSETS / "tiny-sd3")
        for guidance in (1.0, 3.0):
            print(
                f"guidance {guidance}:",
                {k: round(v, 2) for k, v in score(pipe, guidance).items()},
                flush=True,
            )

    print(
        f"sd3: {sum(p.numel() for p in transformer.parameters()) / 1e6:.2f} M parameters",
        flush=True,
    )
    train_flow("sd3", modules, velocity, save, int(SD3_STEPS * scale))


def train_flux(scale: float) -> None:
    """Like Flux-schnell, without embedded guidance; the autoencoder is tiny-sd3's."""
    torch.manual_seed(SEED)
    tokenizer = clip_tokenizer()
    clip = CLIPTextModel(clip_text_config(tokenizer))
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", -10.0),
        *((f"\u2581{word}", -1.0) for word in caption_words()),
    ]
    t5_tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TOKENS)
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(pieces),
            d_model=64,
            d_kv=16,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    ).eval()
    transformer = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=3,
        num_single_layers=3,
        num_attention_heads=4,
        attention_head_dim=32,
        axes_dims_rope=(8, 12, 12),
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=False,
    )
    modules = nn.ModuleList([transformer, clip, t5])
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
    )
    pipe = FluxPipeline(scheduler, load_vae(), clip, tokenizer, t5, t5_tokenizer, transformer)
    positions = pipe._prepare_latent_image_ids(1, 4, 4, torch.device("cpu"), torch.float32)

    def velocity(xt: Tensor, t: Tensor, texts: list[str]) -> Tensor:
        embeds, pooled, text_ids = pipe.encode_prompt(texts, texts, max_sequence_length=TOKENS)
        packed = pipe._pack_latents(xt, len(xt), LATENT_CHANNELS, 8, 8)
        v = transformer(packed, embeds, pooled, t, positions, text_ids, return_dict=False)[0]
        return pipe._unpack_latents(v, scenes.SIZE, scenes.SIZE, pipe.vae_scale_factor)

    def save() -> None:
        pipe.save_pretrained(ASSETS / "tiny-flux")
        forget_places(ASSETS / "tiny-flux")
        print({k: round(v, 2) for k, v in score(pipe, 1.0, TOKENS).items()}, flush=True)

    print(
        f"flux: {sum(p.numel() for p in transformer.parameters()) / 1e6:.2f} M parameters",
        flush=True,
    )
    train_flow("flux", modules, velocity, save, int(FLUX_STEPS * scale))


def train_clip(scale: float) -> None:
    """Contrastive, on true captions: the learned reward of the bundled world."""
    torch.manual_seed(SEED)
    tokenizer = clip_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=scenes.SIZE,
        patch_size=8,
        projection_dim=64,
    )
    model = CLIPModel(
        CLIPConfig(text_config=clip_text_config(tokenizer), vision_config=vision, projection_dim=64)
    )
    truth, _, pictures = draw_pictures(20_000, SEED + 3)
    mean, std = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]
    processor = CLIPImageProcessor(
        size={"shortest_edge": scenes.SIZE},
        crop_size={"height": scenes.SIZE, "width": scenes.SIZE},
        image_mean=mean,
        image_std=std,
    )
    steps = int(2500 * scale)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = cosine(optimizer, steps)

    def save() -> None:
        for part in (model, tokenizer, processor):
            part.save_pretrained(ASSETS / "tiny-clip")
        with torch.no_grad():
            texts = tokenizer(
                [c.text for c in truth[:500]], padding="max_length", return_tensors="pt"
            )
            logits = model(
                **texts, pixel_values=pictures[:500].float() / 127.5 - 1
            ).logits_per_image
        right = [
            truth[row.argmax()].text == caption.text
            for row, caption in zip(logits, truth, strict=False)
        ]
        print(f"the caption among 500 is found for {np.mean(right):.0%} of pictures", flush=True)

    progress = Progress("clip", steps, save)
    for step, index in zip(range(steps), batches(len(pictures), 96, SEED), strict=False):
        captions = [truth[i].text for i in index]
        texts = tokenizer(captions, padding="max_length", return_tensors="pt")
        logits = model(**texts, pixel_values=pictures[index].float() / 127.5 - 1).logits_per_image
        same = torch.tensor([[float(a == b) for b in captions] for a in captions])
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress(step, loss)


if __name__ == "__main__":
    main()
