"""Figures of held-out pairs and pictures."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowalign import distributed
from flowalign.batch import Examples, Pairs
from flowalign.flow import add_noise, mean_square
from flowalign.objectives.draws import ForwardTimes
from flowalign.policy import Policy


@dataclass(frozen=True)
class HeldOut:
    """Figures of pairs or pictures that were not trained on, at fixed times and noise.

    Of velocities without guidance. `reconstruction_error`: ‖v - (noise - x0)‖² of the (better) picture, less is better.
    `chosen_preferred`, of pairs: 1 where against the model without adapter the better picture's error has risen less than the
    worse one's; ½ where equally.
    """

    batch: Examples | Pairs
    """This process's share: every entry whose number is its rank, modulo the number of processes."""
    times: ForwardTimes = field(default_factory=lambda: ForwardTimes(count=8))

    @torch.no_grad()
    def __call__(self, policy: Policy) -> dict[str, Tensor]:
        cond = self.batch.cond.unguided()
        pictures = self.batch.x0 if isinstance(self.batch, Pairs) else (self.batch.x0,)
        error, moved = torch.zeros(2, len(pictures), len(self.batch), device=self.batch.device)
        for draw in self.times(self.batch):
            for i, x0 in enumerate(pictures):
                xt, target = add_noise(x0, draw.t, draw.noise)
                found = mean_square(policy.velocity(xt, draw.t, cond) - target)
                error[i] += found / self.times.count
                if len(pictures) == 2:
                    moved[i] += found - mean_square(
                        policy.at("reference").velocity(xt, draw.t, cond) - target
                    )
        figures = {"reconstruction_error": error[0]}
        if len(pictures) == 2:
            figures["chosen_preferred"] = (moved[0] < moved[1]).float() + 0.5 * (
                moved[0] == moved[1]
            )
        number = self.batch.group.to(self.batch.device)
        table = distributed.gather(torch.stack([number, *figures.values()], 1))
        return dict(zip(figures, table[table[:, 0].argsort()][:, 1:].T, strict=True))
