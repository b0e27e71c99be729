"""Inputs of the checks: a fixed probe, a small batch, and an adapter that is not 0."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowalign import distributed
from flowalign.batch import Batch, Cond
from flowalign.data.prompts import Metadata
from flowalign.flow import Latent, PerImage
from flowalign.models.base import FlowModel
from flowalign.policy import Policy
from flowalign.rewards.base import Reward
from flowalign.rewards.combine import WeightedSum
from flowalign.rollouts.batch_plan import BatchPlan, largest_divisor
from flowalign.rollouts.sources import source_of
from flowalign.training.preflight import IMAGES, PROMPTS
from flowalign.training.setup import Assembly, Inputs

PERTURBATION = 0.02
"""Standard deviation of the noise on the adapter's matrices."""


@dataclass(frozen=True)
class Probe:
    """Inputs of a velocity, of two rows."""

    x: Latent
    t: PerImage
    cond: Cond


def probe_inputs(model: FlowModel, inputs: Inputs) -> Probe:
    """Return two latents of noise at two times, under the first two prompts."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *model.latent_shape, generator=generator).to(model.device)
    cond = model.encode([prompt.text for prompt in (inputs.prompts * 2)[:2]])
    return Probe(x, torch.tensor([0.9, 0.4], device=model.device), cond)


def row_by_row(model: FlowModel | Policy, probe: Probe) -> Latent:
    """Return the velocities of a probe, one row at a time.

    Batches of other sizes round differently. Single rows can be compared bit for bit, whatever
    passes the policy makes.
    """
    rows = [slice(row, row + 1) for row in range(len(probe.x))]
    return torch.cat([model.velocity(probe.x[i], probe.t[i], probe.cond[i]) for i in rows])


def random_reward(images: Tensor, prompts: list[str], metadata: list[Metadata]) -> PerImage:
    """Return a number in [0, 1) that is drawn from each image's own pixels.

    It takes the place of the run's rewards, so that the images of a prompt always differ.
    """
    return (images.double().flatten(1).mean(1) * 1e4) % 1


def small_batch(assembly: Assembly) -> Batch:
    """Return a batch like those of the run, of a few images.

    Its rewards are random, unless the objective needs their gradient.
    """
    context, objective = assembly.context, assembly.config.objective
    images = 1 if context.examples else min(IMAGES, context.plan.images_per_prompt)
    plan = BatchPlan(
        prompts_per_step=PROMPTS * distributed.count(),
        images_per_prompt=images,
        updates_per_step=1,
        max_images_per_pass=context.plan.images_per_pass,
        processes=distributed.count(),
        images_per_row=context.plan.images_per_row,
    )
    scorer = context.scorer
    if not objective.takes_reward_gradient:
        scorer = replace(
            scorer,
            rewards=[Reward("random", random_reward)],
            combine=WeightedSum(),
            images_per_pass=PROMPTS * images,
        )
    batch, _ = source_of(objective.learns_from, replace(context, plan=plan, scorer=scorer))(0)
    return batch


def pass_size(policy: Policy, images: int) -> int:
    """Return the largest divisor of a number of images that is within the run's pass size."""
    return largest_divisor(images, policy.images_per_pass or images)


def whole_pass_size(policy: Policy, batch: Batch) -> int:
    """Return the pass size for a batch, as `pass_size` does for its images."""
    return pass_size(policy, len(batch) * batch.images_per_row)


def perturb_adapter(policy: Policy) -> None:
    """Add noise to the adapter that trains.

    At its start one of the two matrices of each layer is 0: the adapter has no effect, and the
    other matrix has no gradient.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += PERTURBATION * noise.to(parameter.device)


def matrix_names(policy: Policy) -> list[str]:
    """Return the names of the adapter's matrices, in the order of `Policy.parameters`."""
    return [name for name, _ in policy.model.transformer.named_parameters() if ".policy." in name]
