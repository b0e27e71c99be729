"""Sample rollouts: images for prompts, with the paths that led to them."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from flowalign.batch import Keys, Prompts, Rollout
from flowalign.data.prompts import Prompt
from flowalign.flow import concatenate, Latent
from flowalign.policy import Path, Policy


def make_prompts(
    policy: Policy, prompts: list[Prompt], keys: Keys, upcoming: Iterable[str] = ()
) -> Prompts:
    """Return prompts with their embeddings. Each row is one image to make.

    Text encoders that are needed also encode prompts of `upcoming`, which come next.
    """
    texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
    return Prompts(
        prompts=texts,
        metadata=metadata,
        keys=keys,
        cond=policy.encode(texts, upcoming, metadata),
        weight=torch.ones(len(texts)),
    )


def collect(
    policy: Policy, prompts: Prompts, images_per_pass: int, purpose: str = "rollout"
) -> Rollout:
    """Sample an image for each row, in passes of equal size. Rewards and advantages are still 0."""
    return Rollout.concatenate(list(collect_passes(policy, prompts, images_per_pass, purpose)))


def collect_passes(
    policy: Policy, prompts: Prompts, images_per_pass: int, purpose: str = "rollout"
) -> Iterator[Rollout]:
    """Yield what `collect` returns pass by pass; each is sampled when it is asked for."""
    seed, step = prompts.keys.of_step
    # All passes of a step share one window of stochastic steps, so that they can be joined.
    steps = policy.sampler.stochastic_steps(step, seed)
    pieces = prompts.pieces(images_per_pass)
    first, beginnings = 0, (policy.initial_noise(piece, purpose) for piece in pieces)
    # Shared steps keep no states.
    if policy.sampler.same_noise and not policy.kept_steps:
        first = steps.start
        beginnings = shared_beginnings(policy, prompts, first, images_per_pass, purpose)
    for piece, x in zip(pieces, beginnings, strict=True):
        with torch.no_grad():
            path = policy.generate(piece, purpose, steps, first, x)
            images = policy.decode(path.x0)
        yield _rollout(piece, path, images)


@torch.no_grad()
def shared_beginnings(
    policy: Policy, prompts: Prompts, count: int, images_per_pass: int, purpose: str
) -> Iterator[Latent]:
    """Yield for each pass the latents (B, *latent) after the first `count` ODE steps.

    With one noise for a prompt its images are equal until the first stochastic step, so these steps
    are taken once for each prompt (Flow-GRPO-Fast). They equal those of all images up to rounding,
    because a pass holds other rows.
    """
    labels, group = prompts.group.unique(return_inverse=True)
    groups = group.tolist()
    first_images = prompts[[groups.index(label) for label in range(len(labels))]]
    pieces = first_images.pieces(images_per_pass)
    shared = concatenate(policy.beginning(piece, purpose, count) for piece in pieces)
    for rows in group.to(shared.device).split(images_per_pass):
        yield shared[rows]


def _rollout(prompts: Prompts, path: Path, images: Tensor) -> Rollout:
    # Rewards come later, so that a pass is scored while the next is sampled.
    zeros = torch.zeros(len(prompts), device=path.x0.device)
    return Rollout(
        prompts=prompts.prompts,
        metadata=prompts.metadata,
        keys=prompts.keys,
        cond=prompts.cond,
        weight=torch.ones(len(prompts)),
        x0=path.x0,
        path=path.x,
        log_prob=path.log_prob,
        # Bytes on the CPU: images of a whole step would fill a GPU, and rewards read them later.
        images=(images * 255).round().byte().cpu(),
        reward=zeros,
        advantage=zeros,
        steps=path.steps,
        states=path.states,
    )
