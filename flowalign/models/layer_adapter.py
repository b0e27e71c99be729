"""The change that an adapter makes to the weight of one layer, apart from any file."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerAdapter:
    """The change of a layer's weight, scale · B A, in float32."""

    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)
    scale: float
    magnitude: Tensor | None = None  # (out,)
    """Lengths of the rows of the changed weight, if they are trained (DoRA)."""

    @property
    def rank(self) -> int:
        """Inner dimension."""
        return len(self.a)

    @property
    def change(self) -> Tensor:
        """Return what is added to the weight, (out, in)."""
        return self.scale * self.b @ self.a

    def added_to(self, weight: Tensor) -> Tensor:
        """Return the changed weight (out, in)."""
        changed = weight + self.change
        if self.magnitude is None:
            return changed
        return changed * (self.magnitude / changed.norm(dim=1))[:, None]

    def padded(self, a: Tensor) -> "LayerAdapter":
        """Return the same change at the rank of `a` (rank, in), whose rows fill up A.

        New columns of B are 0, so that B A stays the same.
        """
        missing = len(a) - self.rank
        b = torch.cat([self.b, self.b.new_zeros(len(self.b), missing)], 1)
        return replace(self, a=torch.cat([self.a, a[self.rank :]]), b=b)

    def folded(self) -> "LayerAdapter":
        """Return the same change with a scale of 1, which becomes part of B."""
        return LayerAdapter(self.a, self.scale * self.b, 1.0)

    def split(self, sizes: Sequence[int]) -> list["LayerAdapter"]:
        """Return the changes of layers whose outputs, of these sizes, the layer joins.

        Each keeps the part of the rank that it uses.
        """
        parts = []
        for b in self.b.split(list(sizes)):
            used = b.any(0)
            parts.append(replace(self, a=self.a[used], b=b[:, used]))
        return parts

    def swapped(self) -> "LayerAdapter":
        """Return the change of a layer whose two halves of outputs come in the other order."""
        first, second = self.b.chunk(2)
        return replace(self, b=torch.cat([second, first]))


def total(adapters: Sequence[LayerAdapter]) -> LayerAdapter:
    """Return the sum of changes of one layer. Its rank is the sum of their ranks."""
    if len(adapters) == 1:
        return adapters[0]
    folded = [adapter.folded() for adapter in adapters]
    a, b = torch.cat([each.a for each in folded]), torch.cat([each.b for each in folded], 1)
    return LayerAdapter(a, b, 1.0)


def joined(adapters: Sequence[LayerAdapter | None], sizes: Sequence[int]) -> LayerAdapter:
    """Return the change of a layer that joins the outputs of others, exactly.

    A holds the rows of all of them, and B is block by block. The rank is the sum of their ranks.

    Args:
        adapters: The changes of the layers in the order of their outputs; None for no change. At
            least one is not None.
        sizes: How many outputs each layer has.
    """
    present = [adapter.folded() for adapter in adapters if adapter]
    blocks = [
        adapter.folded().b if adapter else present[0].b.new_zeros(size, 0)
        for adapter, size in zip(adapters, sizes, strict=True)
    ]
    return LayerAdapter(torch.cat([each.a for each in present]), torch.block_diag(*blocks), 1.0)
