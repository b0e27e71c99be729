"""The batch arithmetic of a training step."""

from dataclasses import dataclass

from flowalign.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How the images of a step are shared out to updates, processes and passes.

    A step has prompts_per_step × images_per_prompt images, over all processes. With given pairs it
    has prompts_per_step × 2.
    """

    prompts_per_step: int
    images_per_prompt: int
    updates_per_step: int
    max_images_per_pass: int
    """The largest pass that memory allows."""
    processes: int = 1
    images_per_row: int = 1
    """The images that no pass may separate: 2 for given pairs, else 1."""
    whole_groups: bool = False
    """True if the images of a prompt must be on one process."""

    def __post_init__(self) -> None:
        shares = self.updates_per_step * (self.processes if self.whole_groups else 1)
        if self.prompts_per_step % shares:
            on = f" on {self.processes} process(es)" if self.whole_groups else ""
            below = self.prompts_per_step // shares * shares
            nearest = [str(count) for count in (below, below + shares) if count]
            raise UserError(
                f"train.prompts_per_step is {self.prompts_per_step}, which {self.updates_per_step} "
                f"updates{on} cannot share evenly. "
                f"The nearest that they can share: {' or '.join(nearest)}."
            )
        if self._rows_of_all % self.processes:
            below = largest_divisor(self._rows_of_all, self.processes)
            raise UserError(
                f"An update has {self._rows_of_all} images, which {self.processes} processes "
                f"cannot share evenly. Start {below} process(es), or change "
                "train.prompts_per_step."
            )

    @property
    def _rows_of_all(self) -> int:
        """The rows of an update on all processes."""
        return self.prompts_per_step // self.updates_per_step * self.images_per_prompt

    @property
    def rows_per_update(self) -> int:
        """The rows of an update on each process: images, or given pairs."""
        return self._rows_of_all // self.processes

    @property
    def cuts_groups(self) -> bool:
        """True if the images of a prompt are on two processes."""
        return self.rows_per_update % self.images_per_prompt != 0

    @property
    def images_per_update(self) -> int:
        """The images of an update on each process."""
        return self.rows_per_update * self.images_per_row

    @property
    def images_per_step(self) -> int:
        """The images of a step on all processes."""
        return self.prompts_per_step * self.images_per_prompt * self.images_per_row

    @property
    def images_per_pass(self) -> int:
        """The images of a pass: the largest number that memory allows and that divides an update.

        Passes of one size give equal rounding, so that ratios before the first update are 1. A pass
        has whole rows, and at least one of them even if the limit is smaller.
        """
        rows = self.rows_per_update
        # Whole rows, or gradient-free forwards would separate the two images of a pair.
        most = max(1, self.max_images_per_pass // self.images_per_row)
        return largest_divisor(rows, most) * self.images_per_row

    @property
    def note(self) -> str:
        """A message for the user if passes have another size than requested; else empty."""
        if self.images_per_pass == self.max_images_per_pass:
            return ""
        pairs = " in pairs" if self.images_per_row == 2 else ""
        return (
            f"train.images_per_pass is {self.max_images_per_pass}, but an update has "
            f"{self.images_per_update} images{pairs} on each process. Passes have "
            f"{self.images_per_pass} images instead. This changes results only if the objective "
            "draws for each pass."
        )

    def members(self, rank: int) -> list[tuple[int, int]]:
        """Return the rows of a step that a process takes, as (prompt, image) in the step.

        They are an equal share of every update's rows. The images of a prompt are adjacent, so that
        passes can hold whole groups.
        """
        share = self.rows_per_update
        starts = [
            (update * self.processes + rank) * share for update in range(self.updates_per_step)
        ]
        rows = [row for start in starts for row in range(start, start + share)]
        return [divmod(row, self.images_per_prompt) for row in rows]

    def slots(self, rank: int) -> list[int]:
        """Return which of the step's prompts a process takes images of."""
        return list(dict.fromkeys(slot for slot, _ in self.members(rank)))


def largest_divisor(number: int, most: int) -> int:
    """Return the largest divisor of a number that is at most `most`."""
    return next(size for size in range(min(number, most), 0, -1) if number % size == 0)
