"""Sample rollouts: images for prompts, with the paths that led to them."""

from collections.abc import Iterator

import torch

from flowalign.batch import Keys, Prompts, Rollout
from flowalign.data.prompts import Prompt
from flowalign.flow import concatenate, Latent
from flowalign.policy import Policy


def make_prompts(policy: Policy, prompts: list[Prompt], keys: Keys) -> Prompts:
    """Return prompts with their embeddings. Each row is one image to make."""
    texts = [prompt.text for prompt in prompts]
    return Prompts(
        prompts=texts,
        metadata=[prompt.metadata for prompt in prompts],
        keys=keys,
        cond=policy.encode(texts),
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
    if policy.sampler.same_noise:
        beginnings = shared_beginnings(policy, prompts, steps.start, images_per_pass, purpose)
    else:
        beginnings = (policy.initial_noise(piece, purpose)[:, None] for piece in pieces)
    for piece, beginning in zip(pieces, beginnings, strict=True):
        yield _collect(policy, piece, steps, purpose, beginning)


@torch.no_grad()
def shared_beginnings(
    policy: Policy, prompts: Prompts, count: int, images_per_pass: int, purpose: str
) -> Iterator[Latent]:
    """Yield for each pass the latents (B, count + 1, *latent) of the first `count` ODE steps.

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


@torch.no_grad()
def _collect(
    policy: Policy, prompts: Prompts, steps: range, purpose: str, beginning: Latent
) -> Rollout:
    path = policy.generate(prompts, purpose, steps, beginning)
    # Rewards come later, so that a pass is scored while the next is sampled.
    zeros = torch.zeros(len(prompts), device=path.x.device)
    return Rollout(
        prompts=prompts.prompts,
        metadata=prompts.metadata,
        keys=prompts.keys,
        cond=prompts.cond,
        weight=torch.ones(len(prompts)),
        path=path.x,
        log_prob=path.log_prob,
        # Bytes on the CPU: images of a whole step would fill a GPU, and rewards read them later.
        images=(policy.decode(path.x[:, -1]) * 255).round().byte().cpu(),
        reward=zeros,
        advantage=zeros,
        steps=path.steps,
    )
