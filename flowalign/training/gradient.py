"""The gradient of an objective over a batch, pass by pass and over all processes, and the statistics met on the way."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowalign import distributed
from flowalign.batch import Batch
from flowalign.objectives.base import Objective
from flowalign.policy import Policy


@dataclass
class Meter:
    """Means over a step's passes, and of `max_…` statistics the maximum over its first update; nothing waits for a value."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, stats: dict[str, Tensor], rows: int, update: int = 0) -> None:
        """Of a pass of so many rows; a scalar is the mean over them."""
        for name, value in stats.items():
            value = value.detach().float()
            if "max_" in name:
                if update == 0:
                    self.sums[name] = torch.maximum(self.sums.get(name, value.max()), value.max())
                    self.counts[name] = 1
                continue
            value = value if value.dim() else value.expand(rows)
            self.sums[name] = self.sums.get(name, torch.zeros_like(value.sum())) + value.sum()
            self.counts[name] = self.counts.get(name, 0) + value.numel()

    def values(self) -> dict[str, float]:
        """Over all processes, of which some may have had nothing to add."""
        sums = torch.stack(list(self.sums.values())).tolist() if self.sums else []
        found: dict[str, list[tuple[float, int]]] = {}
        for table in distributed.gather_objects(
            dict(zip(self.sums, zip(sums, self.counts.values(), strict=True), strict=True))
        ):
            for name, entry in table.items():
                found.setdefault(name, []).append(entry)
        return {
            name: max(sums)[0]
            if "max_" in name
            else sum(entry[0] for entry in sums) / sum(entry[1] for entry in sums)
            for name, sums in found.items()
        }


def compute_gradient(
    policy: Policy,
    objective: Objective,
    batch: Batch,
    images_per_pass: int,
    meter: Meter,
    update: int = 0,
) -> Tensor:
    """Fill the policy's gradients with those of the mean loss over the batch's rows and draws, over all processes: returned."""
    batch = objective.prepare(policy.at("policy"), batch)
    passes = batch.passes(images_per_pass)
    scale = policy.loss_scale(
        round(distributed.maximum(torch.tensor(float(len(passes)))).item())
    )  # one for all processes
    rows = distributed.mean(
        torch.tensor(float(len(batch)))
    ).item()  # processes may hold different numbers of them
    mean = torch.zeros(1, device=policy.model.device)
    for piece in passes:
        draws = list(objective.draws(piece))
        for t in draws:
            loss = objective.loss(policy, piece, t)
            share = loss.total * (scale * len(piece) / rows / len(draws))
            share.backward()
            mean += share.detach()
            meter.add({"loss": loss.total, **loss.stats}, len(piece), update)
    parameters = policy.parameters()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    joined = (
        distributed.mean(torch.cat([*(gradient.flatten() for gradient in gradients), mean])) / scale
    )
    *parts, mean = joined.split([*(p.numel() for p in parameters), 1])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)
    return mean
