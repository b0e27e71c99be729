"""Distil the bundled SD3 into a model of two steps, assets/tiny-sd3-2step.

    python scripts/distil_tiny.py [--trajectories N] [--epochs N] [--output FOLDER]

The teacher is assets/tiny-sd3 under guidance. Its ODE leads from a noise x_1 through x_½ to x_0.
The student begins as the teacher and learns, without guidance, each half in one Euler step:

    loss = ‖x_1 - ½ v(x_1, 1) - x_½‖² + ‖x̂_½ - ½ v(x̂_½, ½) - x_0‖²

where x̂_½ is the student's own state, without gradient. Prompts are those of
assets/prompts/train.jsonl. The student is saved in half precision, with a scheduler whose two steps
begin at the times 1 and ½. At the end, strict and graded scores of the evaluation prompts are
printed for the teacher and the student.
"""

import argparse
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from pretrain_tiny import remove_local_paths
from torch import nn, Tensor

import flowalign
from flowalign.batch import Cond, Keys
from flowalign.data.prompts import Prompt, read_prompts
from flowalign.flow import Latent, mean_square
from flowalign.models.base import FlowModel
from flowalign.policy import Policy, Sampler
from flowalign.rollouts.collect import make_prompts

ASSETS = Path(__file__).parents[1] / "assets"
TEACHER, STUDENT = ASSETS / "tiny-sd3", ASSETS / "tiny-sd3-2step"
CONFIG = ASSETS.parent / "configs" / "tiny" / "crd.yaml"
GUIDANCE, TEACHER_STEPS = 3.0, 10
TIMES = torch.linspace(1, 0, TEACHER_STEPS + 1).tolist()
"""Times of the teacher, half of which lie on each side of ½."""
SEED, BATCH, RATE = 0, 64, 1e-3

Trajectory = tuple[Latent, Latent, Latent]
"""The latents (B, *latent) of the teacher at the times 1, ½ and 0."""


def main() -> None:
    """Distil, save the student, and print scores."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trajectories", type=int, default=640, help="of the teacher")
    parser.add_argument("--epochs", type=int, default=8, help="over these trajectories")
    parser.add_argument("--output", type=Path, default=STUDENT, help="the student's folder")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    model = flowalign.load_model(TEACHER)
    prompts = read_prompts(str(ASSETS / "prompts" / "train.jsonl"), "prompts")
    cond = model.encode([prompt.text for prompt in prompts])
    start, count = time.monotonic(), max(1, options.trajectories // BATCH)
    batches = list(islice(trajectories(prompts), count))
    print(f"{count * BATCH} trajectories  {time.monotonic() - start:.0f} s", flush=True)
    distil(model, cond, batches, options.epochs)
    save(model.transformer, options.output)
    for steps, guidance in ((TEACHER_STEPS, GUIDANCE), (3, GUIDANCE), (3, 1.0), (2, 1.0)):
        print(f"teacher, {steps} steps, guidance {guidance:g}:", scores(TEACHER, steps, guidance))
    print("student, 2 steps:", scores(options.output, 2, 1.0))


def trajectories(prompts: list[Prompt]) -> Iterator[tuple[Tensor, Trajectory]]:
    """Yield indices (B,) of prompts and the teacher's trajectories, without end."""
    sampler = Sampler(steps=TEACHER_STEPS, guidance=GUIDANCE)
    teacher = Policy(flowalign.load_model(TEACHER), sampler).at("reference")
    teacher.times = TIMES
    generator, step, half = torch.Generator().manual_seed(SEED), 0, TEACHER_STEPS // 2
    while True:
        rows = torch.randint(len(prompts), (BATCH,), generator=generator)
        keys = Keys.training(SEED, step, [(row, 0) for row in range(BATCH)])
        batch = make_prompts(teacher, [prompts[row] for row in rows.tolist()], keys)
        with torch.no_grad():
            noise = teacher.initial_noise(batch)
            middle = teacher.unroll(noise, batch, range(half))
            x0 = teacher.unroll(middle, batch, range(half, TEACHER_STEPS))
        yield rows, (noise, middle, x0)
        step += 1


def distil(
    model: FlowModel, cond: Cond, batches: list[tuple[Tensor, Trajectory]], epochs: int
) -> None:
    """Train the transformer on the trajectories, at a rate that rises and then falls."""
    parameters = list(model.transformer.requires_grad_().parameters())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.99), weight_decay=0.01)
    steps, generator = epochs * len(batches), torch.Generator().manual_seed(SEED)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    start, losses = time.monotonic(), list[Tensor]()
    for _ in range(epochs):
        for index in torch.randperm(len(batches), generator=generator).tolist():
            rows, trajectory = batches[index]
            loss = distillation_loss(model, cond[rows.tolist()], trajectory)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        mean, seconds = torch.stack(losses).mean().item(), time.monotonic() - start
        print(f"loss {mean:.4f}  {seconds:.0f} s", flush=True)
        losses.clear()


def distillation_loss(model: FlowModel, cond: Cond, trajectory: Trajectory) -> Tensor:
    """Return the error of both steps of the student, the second from where the first ended."""
    noise, middle, x0 = trajectory
    t = torch.ones(len(noise))
    own_middle = noise - 0.5 * model.velocity(noise, t, cond)
    begin = own_middle.detach()
    own_x0 = begin - 0.5 * model.velocity(begin, 0.5 * t, cond)
    return (mean_square(own_middle - middle) + mean_square(own_x0 - x0)).mean()


def save(transformer: nn.Module, folder: Path) -> None:
    """Write a pipeline with this transformer; its other parts are the teacher's."""
    pipe = StableDiffusion3Pipeline.from_pretrained(TEACHER, text_encoder_3=None, tokenizer_3=None)
    pipe.transformer.load_state_dict(transformer.state_dict())
    # Without a last time, diffusers' schedule of two steps has the times 1 and 0.001.
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift_terminal=0.5)
    pipe.to(dtype=torch.float16).save_pretrained(folder)
    remove_local_paths(folder)


def scores(model: Path, steps: int, guidance: float) -> dict[str, float]:
    """Return the mean strict and graded scores of the evaluation prompts, ten pictures each."""
    config = flowalign.load_config(
        CONFIG,
        {
            "model.path": str(model),
            "evaluation.sampler.steps": steps,
            "evaluation.sampler.guidance": guidance,
        },
    )
    means = flowalign.evaluate(config).means
    return {name: round(means[name], 3) for name in ("scene_match", "scene_match_graded")}


if __name__ == "__main__":
    main()
