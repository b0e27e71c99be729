"""The batch arithmetic of a training step."""

import math
from dataclasses import dataclass

from flowalign.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """The batch arithmetic of a step: images = prompts_per_step × images_per_prompt, over all processes."""

    prompts_per_step: int
    images_per_prompt: int
    updates_per_step: int
    images_per_pass: int
    processes: int = 1

    def __post_init__(self) -> None:
        shares = self.updates_per_step * self.processes
        if self.prompts_per_step % shares:
            near = sorted(
                {
                    max(1, self.prompts_per_step // shares) * shares,
                    -(-self.prompts_per_step // shares) * shares,
                }
            )
            raise UserError(
                f"train.prompts_per_step is {self.prompts_per_step}, which {self.updates_per_step} updates on {self.processes} "
                f"process(es) cannot share evenly; nearest that can: {' or '.join(map(str, near))}."
            )
        total = self.images_per_update
        if total % self.images_per_pass:
            fitting = sorted(
                {
                    d
                    for n in range(1, math.isqrt(total) + 1)
                    if total % n == 0
                    for d in (n, total // n)
                }
            )
            near = [
                max(n for n in fitting if n <= self.images_per_pass),
                *(n for n in fitting if n > self.images_per_pass),
            ]
            raise UserError(
                f"train.images_per_pass is {self.images_per_pass}, but an update has {total} images on each "
                f"process; nearest that divide: {' or '.join(map(str, near[:2]))}."
            )

    @property
    def images_per_update(self) -> int:
        """On each process."""
        return (
            self.prompts_per_step
            // self.updates_per_step
            // self.processes
            * self.images_per_prompt
        )

    @property
    def images_per_step(self) -> int:
        """On all processes."""
        return self.prompts_per_step * self.images_per_prompt

    def slots(self, rank: int) -> list[int]:
        """Which of the step's prompts a process takes: an equal share of every update's."""
        share = self.prompts_per_step // self.updates_per_step // self.processes
        starts = [
            (update * self.processes + rank) * share for update in range(self.updates_per_step)
        ]
        return [slot for start in starts for slot in range(start, start + share)]
