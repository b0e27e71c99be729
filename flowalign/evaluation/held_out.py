"""Figures of pictures and pairs that were not trained on."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowalign import distributed
from flowalign.batch import Examples, Pairs
from flowalign.flow import add_noise, Latent, mean_square, PerImage
from flowalign.objectives.draws import Draw, ForwardTimes
from flowalign.policy import Policy


def share_of_other_kind(gain: PerImage, liked: Tensor) -> PerImage:
    """Return for each picture (M,) the share of the other kind that its gain is right about.

    A liked picture should have gained more than a disliked one; equal gains count as half. The mean
    over the pictures of either kind is the area under the ROC curve. Without pictures of the other
    kind the share is ½.
    """
    difference = gain[:, None] - gain
    right = (difference > 0).float() + 0.5 * (difference == 0)
    right = torch.where(liked[:, None], right, 1 - right)
    others = (liked[:, None] != liked).float()
    counted = (right * others).sum(1) / others.sum(1).clamp(min=1)
    return torch.where(others.sum(1) > 0, counted, 0.5)


def distance_from_other_kind(gain: PerImage, liked: Tensor) -> PerImage:
    """Return for each picture (M,) how far its gain is on the right side of the middle.

    The middle is half-way between the mean gains of liked and of disliked pictures, because all
    gains may move together. With one kind alone it is 0.
    """
    kinds = gain[liked], gain[~liked]
    middle = sum(kind.mean() for kind in kinds) / 2 if all(map(len, kinds)) else 0
    return torch.where(liked, gain - middle, middle - gain)


@dataclass(frozen=True)
class HeldOut:
    """The held-out pictures, compared at fixed times and noise, without guidance."""

    batch: Examples | Pairs
    """The share of this rank, as `distributed.share` makes it."""
    entries: int
    """The number of entries on all ranks."""
    single: bool = False
    """True if entries are single pictures that were liked or disliked."""
    times: ForwardTimes = field(default_factory=lambda: ForwardTimes(count=8))
    """The times; with their noise, functions of the pictures' keys."""

    @torch.no_grad()
    def __call__(self, policy: Policy) -> dict[str, Tensor]:
        """Return the figures (M,) of every entry on all ranks. All ranks call this together.

        `reconstruction_error` is ‖v - (noise - x0)‖² of the picture, or of the chosen one of a
        pair; less is better. `margin`, for pairs, is how much more the error of the rejected
        picture has risen than that of the chosen one, compared with the model without adapter.
        `chosen_preferred` is 1 if the margin is positive, ½ if it is 0, and 0 otherwise.

        For a single picture, `margin` is how much further its error has fallen than those of both
        kinds on average if it is liked, or how much less if it is disliked. `chosen_preferred` is
        then the share of pictures of the other kind over which, or under which, the fall of its
        error is.
        """
        figures = self._ordered(self._own_figures(policy))
        if not self.single:
            return figures
        liked = figures.pop("liked") > 0
        gain = figures.pop("gain")
        return figures | {
            "margin": distance_from_other_kind(gain, liked),
            "chosen_preferred": share_of_other_kind(gain, liked),
        }

    def _own_figures(self, policy: Policy) -> dict[str, PerImage]:
        """Return the figures of this rank's entries."""
        if not isinstance(self.batch, Pairs):
            return self._picture_figures(policy, self.batch.x0)
        if self.single:
            return self._liked_figures(policy, self.batch.chosen, self.batch.voted[:, 0])
        return self._pair_figures(policy, *self.batch.x0)

    def _ordered(self, figures: dict[str, PerImage]) -> dict[str, Tensor]:
        """Return the figures of all ranks in the order of the entries."""
        number = self.batch.group.to(self.batch.device)
        table = distributed.gather(torch.stack([number, *figures.values()], 1))
        ordered = table[table[:, 0].argsort()][: self.entries, 1:]
        return dict(zip(figures, ordered.T, strict=True))

    def _liked_figures(self, policy: Policy, x0: Latent, liked: Tensor) -> dict[str, PerImage]:
        error, before = torch.zeros(2, len(x0), device=x0.device)
        for draw in self.times(self.batch):
            error += self._error(policy, x0, draw) / self.times.count
            before += self._error(policy.at("reference"), x0, draw) / self.times.count
        gain = before - error
        return {"reconstruction_error": error, "gain": gain, "liked": liked.float()}

    def _pair_figures(
        self, policy: Policy, chosen: Latent, rejected: Latent
    ) -> dict[str, PerImage]:
        reference = policy.at("reference")
        error, chosen_rise, rejected_rise = torch.zeros(3, len(chosen), device=chosen.device)
        # One loop for both pictures, since drawing the noise of a large share takes its time.
        for draw in self.times(self.batch):
            error_at_t = self._error(policy, chosen, draw)
            error += error_at_t / self.times.count
            chosen_rise += error_at_t - self._error(reference, chosen, draw)
            rejected_at_t = self._error(policy, rejected, draw)
            rejected_rise += rejected_at_t - self._error(reference, rejected, draw)
        tie = 0.5 * (chosen_rise == rejected_rise)
        return {
            "reconstruction_error": error,
            "chosen_preferred": (chosen_rise < rejected_rise).float() + tie,
            "margin": (rejected_rise - chosen_rise) / self.times.count,
        }

    def _picture_figures(self, policy: Policy, x0: Latent) -> dict[str, PerImage]:
        error = torch.zeros(len(x0), device=x0.device)
        for draw in self.times(self.batch):
            error += self._error(policy, x0, draw) / self.times.count
        return {"reconstruction_error": error}

    def _error(self, policy: Policy, x0: Latent, draw: Draw) -> PerImage:
        xt, target = add_noise(x0, draw.t, draw.noise)
        return mean_square(policy.velocity(xt, draw.t, self.batch.cond.unguided()) - target)
