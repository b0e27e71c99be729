"""The gradient of an objective over a batch, in passes and over all processes, with statistics.

Invariant: in every update all processes make the same number of forwards and backwards, in the
same order. Models that are sharded over processes exchange weights in each forward and backward,
and hang if one process makes fewer. A process that trains on fewer rows than another therefore
repeats rows in passes of weight 0.

AlignProp and ReFL are exceptions, because each of their passes draws at which step its gradient
starts. Their processes make equally many passes, each with a number of forwards of its own. So they
cannot train a sharded model.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from flowalign import distributed
from flowalign.batch import Batch
from flowalign.objectives.base import (
    Mean,
    MeanOverImages,
    Objective,
    Statistics,
    SumOverDraws,
    Term,
)
from flowalign.policy import Policy

B = TypeVar("B", bound=Batch)
D = TypeVar("D")


@dataclass
class Meter:
    """Statistics of a step's passes. They stay on the device, so that no pass waits for a value."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)
    updates: int = 0
    """Updates so far. Largest values are those of the first, before the weights change."""

    def add(self, stats: Statistics, rows: int) -> None:
        """Add the statistics of a pass of that many rows."""
        for name, stat in stats.items():
            values = stat.values.detach().float()
            if isinstance(stat, Mean):
                values = values if values.dim() else values.expand(rows)
                self.sums[name] = self.sums.get(name, torch.zeros_like(values.sum())) + values.sum()
                self.counts[name] = self.counts.get(name, 0) + values.numel()
            elif self.updates == 0:
                largest = values.max()
                self.maxima[name] = torch.maximum(self.maxima.get(name, largest), largest)

    def values(self) -> dict[str, float]:
        """Return the statistics over all processes, some of which may have had nothing to add."""
        tensors = [*self.sums.values(), *self.maxima.values()]
        numbers = torch.stack(tensors).tolist() if tensors else []
        sums = dict(zip(self.sums, numbers, strict=False))
        maxima = dict(zip(self.maxima, numbers[len(sums) :], strict=True))
        tables = distributed.gather_objects((sums, self.counts, maxima))
        means: dict[str, float] = {}
        for name in _names(table[0] for table in tables):
            total = sum(table[0].get(name, 0.0) for table in tables)
            means[name] = total / sum(table[1].get(name, 0) for table in tables)
        largest = {
            name: max(table[2][name] for table in tables if name in table[2])
            for name in _names(table[2] for table in tables)
        }
        return means | largest


def _names(tables: Iterator[dict[str, float]]) -> list[str]:
    """Return the keys of all tables, each once and in order."""
    return list(dict.fromkeys(name for table in tables for name in table))


@dataclass(frozen=True)
class Pass(Generic[B, D]):
    """One forward and backward: some rows at one draw."""

    batch: B
    draw: D
    number: int
    """The position of the draw among the draws of its rows."""
    weight: float
    """The share of this pass in the mean loss of the update; 0 for a padded pass."""


@dataclass(frozen=True, kw_only=True)
class Passes(Generic[B, D]):
    """The passes of one update on this process. Iterate to make each when it is needed."""

    objective: Objective[B, D]
    batch: B
    """The rows to train on, then those of padded passes."""
    terms: list[dict[str, Tensor]]
    """The result of `group_terms` for each draw; empty if passes compute it in place."""
    rows: int
    """How many rows this process trains on."""
    mean_rows: float
    """The mean of `rows` over processes."""
    size: int
    """How many rows a pass has, at most."""

    @property
    def count(self) -> int:
        """The number of pieces that the rows are cut into, the same on all processes."""
        return math.ceil(len(self.batch) / self.size)

    def __iter__(self) -> Iterator[Pass[B, D]]:
        for start in range(0, len(self.batch), self.size):
            padded = start >= self.rows
            end = len(self.batch) if padded else self.rows
            rows = slice(start, min(start + self.size, end))
            piece = self.batch[rows]
            draws = list(self.objective.draws(piece))
            weight = 0.0 if padded else len(piece) / self.mean_rows / len(draws)
            for number, draw in enumerate(draws):
                terms = self.terms[number] if self.terms else {}
                terms = {name: values[rows] for name, values in terms.items()}
                yield Pass(replace(piece, terms=terms), draw, number, weight)


def split(
    policy: Policy, objective: Objective[B, D], batch: B, images_per_pass: int
) -> Passes[B, D]:
    """Return the passes of an update, after computing the terms that its passes cannot.

    All processes must call it together. `batch` holds the rows of weight 0 too.
    """
    rows = batch.trainable_rows()
    cut = not rows.groups_fit(images_per_pass)
    # One decision for all processes: `group_terms` makes forwards that all must make.
    counts, cuts = zip(*distributed.gather_objects((len(rows), cut)), strict=True)
    most = max(counts)
    if most > len(rows):
        padding = batch.padding(most - len(rows))
        padded = type(batch).concatenate([rows, padding]) if len(rows) else padding
    else:
        padded = rows
    terms_needed = objective.terms_span_update or any(cuts)
    terms_first = most > 0 and objective.has_group_terms and terms_needed
    return Passes(
        objective=objective,
        batch=padded,
        terms=whole_terms(policy, objective, padded, len(rows)) if terms_first else [],
        rows=len(rows),
        # Processes may train on different numbers of rows; the mean loss is over all of them.
        mean_rows=sum(counts) / len(counts),
        size=batch.rows_per_pass(images_per_pass),
    )


@torch.no_grad()
def whole_terms(
    policy: Policy, objective: Objective[B, D], batch: B, rows: int
) -> list[dict[str, Tensor]]:
    """Return the terms of each draw; means are over the first `rows` rows of every process."""
    view = policy.at("policy")
    by_draw = [objective.group_terms(view, batch, draw) for draw in objective.draws(batch)]
    sums = {
        name: torch.stack([_values(terms[name]) for terms in by_draw]).sum(0)
        for name, term in by_draw[0].items()
        if isinstance(term, SumOverDraws)
    }
    return [
        {
            name: sums[name] if name in sums else _row_wise(term, rows)
            for name, term in terms.items()
        }
        for terms in by_draw
    ]


def _values(term: Term) -> Tensor:
    return term if isinstance(term, Tensor) else term.values


def _row_wise(term: Term, rows: int) -> Tensor:
    """Return a term's rows; a mean over images is the same in every row."""
    if not isinstance(term, MeanOverImages):
        return _values(term)
    values = term.values[:rows].double()
    total, count = distributed.mean(
        torch.stack([values.sum(), torch.full_like(values.sum(), values.numel())])
    )
    return (total / count.clamp(min=1)).to(term.values.dtype).expand(len(term.values))


def compute_gradient(
    policy: Policy,
    objective: Objective[B, D],
    batch: B,
    images_per_pass: int,
    meter: Meter,
) -> Tensor | None:
    """Fill the policy's gradients with those of the mean loss, and return that loss.

    The mean is over the trainable rows and draws of all processes, which must call it together.
    Returns None if no process has a row to train on. Statistics are added to `meter`.
    """
    passes = split(policy, objective, batch, images_per_pass)
    if not passes.mean_rows:
        return None
    # One scale for all processes, or gradients could not be averaged. It keeps small gradients of
    # float16 models from becoming 0.
    scale = policy.loss_scale(passes.count)
    mean = torch.zeros(1, device=policy.model.device)
    for one in passes:
        loss = objective.loss(policy, one.batch, one.draw)
        share = loss.total * (scale * one.weight)
        share.backward()
        mean += share.detach()
        if one.weight:
            meter.add({"loss": Mean(loss.total), **loss.stats}, len(one.batch))
    meter.updates += 1
    return _average_gradients(policy, mean, scale)


def _average_gradients(policy: Policy, mean: Tensor, scale: float) -> Tensor:
    """Average the policy's gradients and the loss over processes, in one message."""
    parameters = policy.parameters()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    joined = torch.cat([*(gradient.flatten() for gradient in gradients), mean])
    joined = distributed.mean(joined) / scale
    *parts, mean = joined.split([*(p.numel() for p in parameters), 1])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)
    return mean
