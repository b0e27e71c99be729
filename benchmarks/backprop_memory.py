"""Measure what the gradient of a reward through the sampler keeps for its backward pass.

    python benchmarks/backprop_memory.py

Prints the bytes of the tensors that one loss of AlignProp saves, by the number of steps with
gradient, with recomputation and without it. The model is the bundled SD3, the reward the tiny CLIP.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn, Tensor

from flowalign.advantages import group_advantage
from flowalign.config.load import load_config
from flowalign.data.prompts import read_prompts
from flowalign.models import load_model
from flowalign.objectives.alignprop import AlignProp
from flowalign.policy import Policy, Sampler
from flowalign.rewards.combine import WeightedSum
from flowalign.rewards.registry import load_rewards
from flowalign.rollouts.batch_plan import BatchPlan
from flowalign.rollouts.ranking_settings import Ranking
from flowalign.rollouts.scoring import RolloutScorer
from flowalign.rollouts.sources import differentiable_prompts, SourceContext
from flowalign.rollouts.voted import VotedPictures

ROOT = Path(__file__).parents[1]
STEPS, IMAGES = 10, 8
DEPTHS = (1, 2, 5, 10)


def main() -> None:
    """Print the table, and write it where --output says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    context = make_context()
    recomputed = kept_by_depth(context)
    # Nothing else in the policy checkpoints, so this is the plain computation.
    with patch("flowalign.policy.checkpoint", call_without_recomputation):
        plain = kept_by_depth(context)
    print(f"{IMAGES} images, {STEPS} sampler steps; MB kept for the backward pass")
    print(f"{'steps with gradient':>20}{'recomputed':>12}{'plain':>10}")
    for depth in DEPTHS:
        print(f"{depth:20}{recomputed[depth] / 1e6:12.2f}{plain[depth] / 1e6:10.2f}")
    growth = recomputed[10] / recomputed[2], plain[10] / plain[2]
    print(f"ten steps over two: {growth[0]:.2f} recomputed, {growth[1]:.2f} plain")
    if options.output:
        options.output.write_text(json.dumps({"recomputed": recomputed, "plain": plain}, indent=2))


def make_context() -> SourceContext:
    """Return what a step of configs/tiny/alignprop.yaml needs, for IMAGES prompts."""
    config = load_config(ROOT / "configs" / "tiny" / "alignprop.yaml")
    rewards, device = load_rewards(config.rewards), torch.device("cpu")
    judge = RolloutScorer(rewards, WeightedSum(), group_advantage, IMAGES, device)
    policy = Policy(load_model(config.model), Sampler(steps=STEPS))
    return SourceContext(
        policy=policy,
        scorer=judge,
        prompts=read_prompts(config.data.prompts),
        examples=[],
        plan=BatchPlan(
            prompts_per_step=IMAGES,
            images_per_prompt=1,
            updates_per_step=1,
            max_images_per_pass=IMAGES,
        ),
        seed=0,
        sampling_weights="policy",
        steps=100,
        keeps_paths=True,
        null_gradient=True,
        ranking=Ranking(),
        voted=VotedPictures(policy, lambda _: policy.sampler, keeps_paths=False),
    )


def kept_by_depth(context: SourceContext) -> dict[int, int]:
    """Return the bytes that one loss keeps, by the number of steps with gradient."""
    batch, _ = differentiable_prompts(context, 0)
    kept = {}
    for depth in DEPTHS:
        objective = AlignProp(depth=depth)
        kept[depth] = saved_bytes(
            context.policy, lambda o=objective: o.loss(context.policy, batch, None).total
        )
    return kept


def call_without_recomputation(
    function: Callable[..., Tensor], *arguments: object, use_reentrant: bool
) -> Tensor:
    """Replace `torch.utils.checkpoint.checkpoint` by a plain call."""
    return function(*arguments)


def saved_bytes(policy: Policy, loss: Callable[[], Tensor]) -> int:
    """Return the bytes of the storages that autograd keeps for a loss, weights not counted."""
    weights = {weight.untyped_storage().data_ptr() for weight in weights_of(policy)}
    storages: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Views of a weight have its storage, and are not new memory either.
        if storage.data_ptr() not in weights and not isinstance(tensor, nn.Parameter):
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        total = loss()
    # The graph must live until here: a freed address could be given out again and count once.
    del total
    return sum(storages.values())


def weights_of(policy: Policy) -> Iterator[nn.Parameter]:
    """Yield the parameters of all networks of the model."""
    for part in policy.model.networks().values():
        if isinstance(part, nn.Module):
            yield from part.parameters()


if __name__ == "__main__":
    main()
