"""From prompts to judged rollouts: collect, and judge."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from flowalign.batch import Cond, Prompts, Rollout
from flowalign.data.prompts import Prompt
from flowalign.flow import concatenate
from flowalign.policy import Policy


def make_prompts(
    policy: Policy, prompts: list[Prompt], keys: list[tuple[int, int, int, int]]
) -> Prompts:
    """Prompts with their embeddings, one row an image."""
    texts = [prompt.text for prompt in prompts]
    return Prompts(
        texts, [prompt.metadata for prompt in prompts], torch.tensor(keys), policy.encode(texts)
    )


def collect(
    policy: Policy, prompts: Prompts, images_per_pass: int, purpose: str = "rollout"
) -> Rollout:
    """Images for the prompts, made by a gradient-free view in passes of equal size; rewards are still 0."""
    return concatenate_rollouts(list(passes(policy, prompts, images_per_pass, purpose)))


def passes(
    policy: Policy, prompts: Prompts, images_per_pass: int, purpose: str = "rollout"
) -> Iterator[Rollout]:
    """As `collect`, pass by pass, each made when it is asked for."""
    seed, step = prompts.keys[0, :2].tolist()
    steps = policy.sampler.stochastic_steps(step, seed)
    return (_collect(policy, piece, steps, purpose) for piece in prompts.pieces(images_per_pass))


@torch.no_grad()
def _collect(policy: Policy, prompts: Prompts, steps: range, purpose: str) -> Rollout:
    path = policy.generate(prompts, purpose, steps)
    images = (policy.decode(path.x[:, -1]) * 255).round().byte().cpu()
    unjudged = torch.zeros(len(prompts), device=path.x.device)
    shared = prompts.prompts, prompts.metadata, prompts.keys, prompts.cond
    return Rollout(*shared, path.x, path.log_prob, images, unjudged, unjudged, path.steps)


def concatenate_rollouts(pieces: list[Rollout]) -> Rollout:
    """One rollout of all the pieces' images."""
    if len(pieces) == 1:
        return pieces[0]
    joined = {
        name: concatenate(getattr(p, name) for p in pieces)
        for name in (
            "keys",
            "path",
            "log_prob",
            "images",
            "reward",
            "advantage",
            "weight",
            "prepared",
        )
    }
    cond = Cond.concatenate([piece.cond for piece in pieces])
    texts = [text for piece in pieces for text in piece.prompts]
    metadata = [entry for piece in pieces for entry in piece.metadata]
    return replace(pieces[0], prompts=texts, metadata=metadata, cond=cond, **joined)
