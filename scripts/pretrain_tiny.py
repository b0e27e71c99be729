"""Train the bundled models, assets/tiny-{sd3,flux,clip}, from random weights.

    python scripts/pretrain_tiny.py [STAGE ...]

The stages, in order, are vae, sd3, flux and clip. Each trains on pictures of
`flowalign.worlds.scenes` and saves its weights every few minutes. Afterwards,
`python scripts/pretrain_gates.py` measures the result and writes docs/bundled-models.md.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, repeat
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
"""Share of training captions that are wrong in one fact, as captions on the web are.

The models can draw what a prompt says, but do not always prefer to. Alignment repairs preference.
"""
EMPTY = 0.1
"""Share of empty prompts, which guidance needs."""
LATENT_CHANNELS = 8
LATENT_NOISE = 0.3
TOKENS = 10
"""Length of a tokenised caption. The longest caption has eight words."""
BATCH = 64
VAE_STEPS, SD3_STEPS, FLUX_STEPS, CLIP_STEPS = 2400, 10_000, 10_000, 2500


def main() -> None:
    """Run the stages named on the command line."""
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
        "stages", nargs="*", metavar="STAGE", help=f"one of {', '.join(stages)} (default: all)"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="multiplies the number of training steps"
    )
    options = parser.parse_args()
    if unknown := set(options.stages) - set(stages):
        parser.error(f"unknown stage {unknown.pop()!r}. Choose from {', '.join(stages)}.")
    for name in options.stages or stages:
        stages[name](options.scale)


@dataclass
class Loop:
    """An optimisation loop with a cosine schedule, progress lines, and regular saving."""

    name: str
    module: nn.Module
    optimizer: torch.optim.Optimizer
    steps: int
    save: Callable[[], None]
    after_step: Callable[[], None] = lambda: None
    """Called when the weights have changed, for example to update an average of them."""

    def run(self, batches: Iterator[Tensor], loss_of: Callable[[Tensor], Tensor]) -> None:
        """Minimise `loss_of(indices)` over the batches."""
        schedule = cosine_schedule(self.optimizer, self.steps)
        start, losses = time.monotonic(), list[Tensor]()
        for step, indices in zip(range(1, self.steps + 1), batches, strict=False):
            loss = loss_of(indices)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimizer.step()
            schedule.step()
            # After the update and before saving, so that a saved average has this step in it.
            self.after_step()
            losses.append(loss.detach())
            if step % 100 == 0 or step == self.steps:
                seconds, mean = time.monotonic() - start, torch.stack(losses).mean().item()
                line = f"{self.name} {step}/{self.steps}  loss {mean:.4f}  {seconds:.0f} s"
                print(line, flush=True)
                losses.clear()
            if step % 1000 == 0 or step == self.steps:
                self.save()


def cosine_schedule(
    optimizer: torch.optim.Optimizer, steps: int, warmup: int = 100
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return a schedule that warms up linearly and then falls to 1 % along a cosine."""

    def factor(step: int) -> float:
        cosine = (1 + math.cos(math.pi * min(1, step / steps))) / 2
        return min(1, (step + 1) / warmup) * (0.01 + 0.99 * cosine)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def shuffled_batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of indices forever, in a new order every epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).split(size)[: count // size]


def draw_pictures(
    count: int, seed: int
) -> tuple[list[scenes.Caption], list[scenes.Caption], Tensor]:
    """Return true captions, training captions of which some are wrong, and pictures.

    The pictures are bytes of shape (count, 3, 64, 64).
    """
    rng = np.random.default_rng(seed)
    truth = [scenes.draw_caption(rng) for _ in range(count)]
    quoted = [scenes.misquote(c, rng) if rng.random() < MISQUOTED else c for c in truth]
    drawn = [scenes.draw_scene(caption, rng) for caption in truth]
    parts = [drawn[i : i + 500] for i in range(0, count, 500)]
    pictures = [(scenes.render(part) * 255).round().byte() for part in parts]
    return truth, quoted, torch.cat(pictures)


def to_signed(pictures: Tensor) -> Tensor:
    """Convert byte pictures to floats in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def remove_local_paths(folder: Path) -> None:
    """Remove from saved configurations the local path that their parts were loaded from."""
    for file in [*folder.glob("model_index.json"), *folder.rglob("config.json")]:
        config = json.loads(file.read_text())
        if config.pop("_name_or_path", None):
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def train_vae(scale: float) -> None:
    """Train an autoencoder whose latents can be decoded under noise.

    The last errors of a sampler then do not show in the pictures.
    """
    torch.manual_seed(SEED)
    vae = build_vae()
    _, _, pictures = draw_pictures(20_000, SEED)

    def save() -> None:
        # Pipelines normalise latents with these numbers, to mean 0 and deviation 1.
        latents = latent_means(vae, pictures[:2000])
        vae.register_to_config(
            scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item()
        )
        vae.save_pretrained(ASSETS / "tiny-sd3" / "vae")
        remove_local_paths(ASSETS / "tiny-sd3")

    def loss_of(indices: Tensor) -> Tensor:
        x = to_signed(pictures[indices]).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        z = posterior.sample()
        z = z + LATENT_NOISE * torch.rand(len(z), 1, 1, 1) * torch.randn_like(z)
        error = vae.decode(z).sample - x
        # A weak KL: latents must be compact, but need not be normally distributed.
        return error.abs().mean() + error.square().mean() + 2e-5 * posterior.kl().mean()

    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, weight_decay=1e-3)
    loop = Loop("vae", vae, optimizer, steps=int(VAE_STEPS * scale), save=save)
    loop.run(shuffled_batches(len(pictures), 32, SEED), loss_of)


def build_vae() -> AutoencoderKL:
    """Return an autoencoder with random weights that maps (3, 64, 64) to (8, 8, 8)."""
    return AutoencoderKL(
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


def load_vae() -> AutoencoderKL:
    """Return the trained autoencoder, frozen."""
    return AutoencoderKL.from_pretrained(ASSETS / "tiny-sd3" / "vae").requires_grad_(False)


@torch.no_grad()
def latent_means(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Encode byte pictures to the means of their latents, which are not normalised."""
    parts = pictures.split(100)
    return torch.cat([vae.encode(to_signed(part)).latent_dist.mean for part in parts])


def caption_words() -> list[str]:
    """Return the words of all captions, sorted."""
    captions = chain.from_iterable(scenes.captions(kind) for kind in scenes.KINDS)
    texts = [caption.text for caption in captions]
    return sorted(set(" ".join(texts).split()))


def clip_tokenizer() -> CLIPTokenizer:
    """Return a tokenizer in CLIP's format with one token for every word of the captions."""
    words = caption_words()
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = Whitespace()
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    trainer = BpeTrainer(
        vocab_size=1000,
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    # Words are equally frequent, and the library breaks ties at random: some merges differ from one
    # call to the next. Every word is one token in any case.
    bpe.train_from_iterator(words, trainer)
    state = json.loads(bpe.to_str())["model"]
    # The end token last: parts of transformers find it as the highest id of a prompt.
    special = ["<|startoftext|>", "<|endoftext|>"]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *state["vocab"]]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *special]))}
    tokenizer = CLIPTokenizer(
        vocab=vocabulary, merges=[tuple(pair) for pair in state["merges"]], model_max_length=TOKENS
    )
    assert all(len(tokenizer(word).input_ids) == 3 for word in words)
    return tokenizer


def clip_text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Return the configuration of a small CLIP text encoder."""
    # The special tokens are the tokenizer's own. With the defaults of `CLIPTextConfig`, the pooled
    # embedding would be the same for all prompts.
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


def build_t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    """Return a small T5 encoder with random weights, and its tokenizer of whole words."""
    # T5 marks the beginning of a word with U+2581, and expects these three pieces first.
    words = [f"\u2581{word}" for word in caption_words()]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), *zip(words, repeat(-1.0))]
    config = T5Config(
        vocab_size=len(pieces),
        d_model=64,
        d_kv=16,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TOKENS)
    # transformers builds the encoder in training mode, in which dropout would be active.
    return T5EncoderModel(config).eval(), tokenizer


Velocity = Callable[[Tensor, Tensor, list[str]], Tensor]


def train_flow(loop: Loop, velocity: Velocity) -> None:
    """Minimise the mean square of velocity(xt, t, captions) - (noise - x0).

    The saved weights are exponential averages.
    """
    _, quoted, pictures = draw_pictures(40_000, SEED + 1)
    vae = load_vae()
    latents = (latent_means(vae, pictures) - vae.config.shift_factor) * vae.config.scaling_factor
    parameters, save = list(loop.module.parameters()), loop.save
    ema = EMAModel(parameters, decay=0.9995, use_ema_warmup=True, power=0.8)
    generator = torch.Generator().manual_seed(SEED)

    def save_average() -> None:
        # The pipeline shares these parameters, so the averages are put into them for the save.
        ema.store(parameters)
        ema.copy_to(parameters)
        save()
        ema.restore(parameters)

    def loss_of(indices: Tensor) -> Tensor:
        x0, texts = latents[indices], [quoted[i].text for i in indices]
        empty = torch.rand(BATCH, generator=generator) < EMPTY
        texts = ["" if e else text for e, text in zip(empty, texts, strict=True)]
        # One time from each of BATCH equal parts of [0, 1]: less variance than independent times.
        t = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
        noise = torch.randn(x0.shape, generator=generator)
        xt = torch.lerp(x0, noise, t.view(-1, 1, 1, 1))
        with torch.autocast("cpu", torch.bfloat16):
            v = velocity(xt, t, texts)
        return (v.float() - (noise - x0)).square().mean()

    loop.save, loop.after_step = save_average, lambda: ema.step(parameters)
    loop.run(shuffled_batches(len(latents), BATCH, SEED), loss_of)


def flow_optimizer(module: nn.Module) -> torch.optim.Optimizer:
    """Return the optimiser of the flow models."""
    return torch.optim.AdamW(module.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01)


@torch.no_grad()
def strict_scores(
    pipe: DiffusionPipeline, guidance: float, sequence: int = 0, count: int = 300
) -> dict[str, float]:
    """Return the strict scores, by kind and overall, of pictures made in ten steps."""
    rng = np.random.default_rng(SEED + 2)
    kinds = np.repeat(scenes.KINDS, count // len(scenes.KINDS))
    captions = [scenes.draw_caption(rng, kind) for kind in kinds]
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
    pairs = zip(captions, pictures, strict=True)
    scores = np.array([scenes.match(c, scenes.read_picture(p)).strict for c, p in pairs])
    by_kind = zip(scenes.KINDS, scores.reshape(len(scenes.KINDS), -1), strict=True)
    return {kind: float(rows.mean()) for kind, rows in by_kind} | {"overall": float(scores.mean())}


def save_pipeline(pipe: DiffusionPipeline, name: str) -> None:
    """Write a pipeline to its folder of assets."""
    pipe.save_pretrained(ASSETS / name)
    remove_local_paths(ASSETS / name)


def print_scores(scores: dict[str, float]) -> None:
    """Print scores with two digits."""
    print({kind: round(score, 2) for kind, score in scores.items()}, flush=True)


def print_size(name: str, transformer: nn.Module) -> None:
    """Print the number of parameters."""
    millions = sum(p.numel() for p in transformer.parameters()) / 1e6
    print(f"{name}: {millions:.2f} M parameters", flush=True)


def train_sd3(scale: float) -> None:
    """Train the transformer and the text encoders of tiny-sd3."""
    torch.manual_seed(SEED)
    pipe = build_sd3()

    def velocity(xt: Tensor, t: Tensor, texts: list[str]) -> Tensor:
        # Without T5, the pipeline would append zeros up to `max_sequence_length` tokens.
        embeds, _, pooled, _ = pipe.encode_prompt(
            texts, texts, texts, do_classifier_free_guidance=False, max_sequence_length=0
        )
        return pipe.transformer(xt, embeds, pooled, 1000 * t, return_dict=False)[0]

    def save() -> None:
        save_pipeline(pipe, "tiny-sd3")
        for guidance in (1.0, 3.0):
            print(f"guidance {guidance}:", end=" ")
            print_scores(strict_scores(pipe, guidance))

    print_size("sd3", pipe.transformer)
    modules = nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2])
    optimizer, steps = flow_optimizer(modules), int(SD3_STEPS * scale)
    train_flow(Loop("sd3", modules, optimizer, steps=steps, save=save), velocity)


def build_sd3() -> StableDiffusion3Pipeline:
    """Return a pipeline with the trained autoencoder; its other networks have random weights."""
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
    return StableDiffusion3Pipeline(
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


def train_flux(scale: float) -> None:
    """Train the transformer and the text encoders of tiny-flux."""
    torch.manual_seed(SEED)
    pipe = build_flux()
    positions = pipe._prepare_latent_image_ids(1, 4, 4, torch.device("cpu"), torch.float32)

    def velocity(xt: Tensor, t: Tensor, texts: list[str]) -> Tensor:
        embeds, pooled, text_ids = pipe.encode_prompt(texts, texts, max_sequence_length=TOKENS)
        packed = pipe._pack_latents(xt, len(xt), LATENT_CHANNELS, 8, 8)
        v = pipe.transformer(packed, embeds, pooled, t, positions, text_ids, return_dict=False)[0]
        return pipe._unpack_latents(v, scenes.SIZE, scenes.SIZE, pipe.vae_scale_factor)

    def save() -> None:
        save_pipeline(pipe, "tiny-flux")
        print_scores(strict_scores(pipe, 1.0, TOKENS))

    print_size("flux", pipe.transformer)
    modules = nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2])
    optimizer, steps = flow_optimizer(modules), int(FLUX_STEPS * scale)
    train_flow(Loop("flux", modules, optimizer, steps=steps, save=save), velocity)


def build_flux() -> FluxPipeline:
    """Return a pipeline like Flux-schnell's, without embedded guidance.

    Its autoencoder is tiny-sd3's. Its other networks have random weights.
    """
    tokenizer = clip_tokenizer()
    clip = CLIPTextModel(clip_text_config(tokenizer))
    t5, t5_tokenizer = build_t5()
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
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
    )
    return FluxPipeline(scheduler, load_vae(), clip, tokenizer, t5, t5_tokenizer, transformer)


def train_clip(scale: float) -> None:
    """Train CLIP on true captions with the contrastive loss: the learned reward of the world."""
    torch.manual_seed(SEED)
    tokenizer = clip_tokenizer()
    model, processor = build_clip(tokenizer)
    truth, _, pictures = draw_pictures(20_000, SEED + 3)
    captions = [caption.text for caption in truth]

    def logits_of(indices: Tensor) -> Tensor:
        texts = [captions[i] for i in indices]
        tokens = tokenizer(texts, padding="max_length", return_tensors="pt")
        return model(**tokens, pixel_values=to_signed(pictures[indices])).logits_per_image

    def save() -> None:
        for part in (model, tokenizer, processor):
            part.save_pretrained(ASSETS / "tiny-clip")
        with torch.no_grad():
            best = logits_of(torch.arange(500)).argmax(1)
        right = [captions[i] == captions[row] for row, i in enumerate(best)]
        print(f"of 500 captions, the right one is chosen for {np.mean(right):.0%} of pictures")

    def loss_of(indices: Tensor) -> Tensor:
        logits = logits_of(indices)
        # A batch may hold a caption several times: each of its pictures is a correct answer.
        target = equal_captions([captions[i] for i in indices])
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    loop = Loop("clip", model, optimizer, steps=int(CLIP_STEPS * scale), save=save)
    loop.run(shuffled_batches(len(pictures), 96, SEED), loss_of)


def equal_captions(captions: list[str]) -> Tensor:
    """Return (B, B): for every row, equal shares for the columns with the same caption."""
    same = torch.tensor([[float(a == b) for b in captions] for a in captions])
    return same / same.sum(1, keepdim=True)


def build_clip(tokenizer: CLIPTokenizer) -> tuple[CLIPModel, CLIPImageProcessor]:
    """Return a small CLIP with random weights, and its image processor."""
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=scenes.SIZE,
        patch_size=8,
        projection_dim=64,
    )
    text = clip_text_config(tokenizer)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))
    processor = CLIPImageProcessor(
        size={"shortest_edge": scenes.SIZE},
        crop_size={"height": scenes.SIZE, "width": scenes.SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return model, processor


if __name__ == "__main__":
    main()
