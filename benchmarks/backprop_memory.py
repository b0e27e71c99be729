"""What a reward's gradient through the sampler keeps for the backward pass: python benchmarks/backprop_memory.py

Bytes of the tensors saved by one loss of AlignProp on the bundled SD3 with the bundled CLIP as reward, by the number of
backpropagated steps; and the same with nothing recomputed.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from flowalign.advantages import group_advantage
from flowalign.config.load import load_config
from flowalign.data.prompts import read_prompts
from flowalign.models import load_model
from flowalign.objectives.alignprop import AlignProp
from flowalign.policy import Policy, Sampler
from flowalign.rewards.combine import WeightedSum
from flowalign.rewards.registry import load_rewards
from flowalign.rollouts.batch_plan import BatchPlan
from flowalign.rollouts.ranking import Ranking
from flowalign.rollouts.scoring import RolloutScorer
from flowalign.rollouts.sources import differentiable_prompts, SourceContext

ROOT = Path(__file__).parents[1]
STEPS, IMAGES = 10, 8
DEPTHS = (1, 2, 5, 10)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(ROOT / "configs" / "tiny" / "alignprop.yaml")
    policy = Policy(load_model(config.model), Sampler(steps=STEPS))
    judge = RolloutScorer(
        load_rewards(config.rewards), WeightedSum(), group_advantage, IMAGES, torch.device("cpu")
    )
    prompts, counts = read_prompts(config.data.prompts), BatchPlan(IMAGES, 1, 1, IMAGES)
    context = SourceContext(policy, judge, prompts, [], counts, 0, "policy", Ranking())
    batch, _ = differentiable_prompts(context)(0)

    def kept(depth: int) -> int:
        return saved_bytes(policy, lambda: AlignProp(depth=depth).loss(policy, batch, 0).total)

    recomputed = {depth: kept(depth) for depth in DEPTHS}
    with patch(
        "flowalign.policy.checkpoint",
        lambda function, *arguments, use_reentrant: function(*arguments),
    ):
        plain = {depth: kept(depth) for depth in DEPTHS}
    print(f"{IMAGES} images, {STEPS} sampler steps; MB kept for the backward pass")
    print(f"{'steps with gradient':>20}{'recomputed':>12}{'plain':>10}")
    for depth in DEPTHS:
        print(f"{depth:20}{recomputed[depth] / 1e6:12.2f}{plain[depth] / 1e6:10.2f}")
    print(
        f"ten steps over two: {recomputed[10] / recomputed[2]:.2f} recomputed, {plain[10] / plain[2]:.2f} plain"
    )
    if options.output:
        options.output.write_text(json.dumps({"recomputed": recomputed, "plain": plain}, indent=2))


def saved_bytes(policy: Policy, loss: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps once the loss is there, without those of weights, or views of them."""
    modules = [
        module
        for module in policy.model.pipe.components.values()
        if isinstance(module, torch.nn.Module)
    ]
    weights = {
        parameter.untyped_storage().data_ptr()
        for module in modules
        for parameter in module.parameters()
    }
    storages: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and not isinstance(tensor, torch.nn.Parameter):
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        total = loss()
    del total
    return sum(storages.values())


if __name__ == "__main__":
    main()
