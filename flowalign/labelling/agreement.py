"""How far votes can be trusted: agreement of voters with themselves, and habits."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from flowalign.data.votes import Vote, VotedPicture
from flowalign.rewards.accuracy import proportion_interval

ENOUGH = 10
"""The fewest repeated questions that give a rate of wrong votes."""


@dataclass(frozen=True, kw_only=True)
class Habits:
    """Figures of some votes. Shares of nothing are NaN."""

    votes: int
    """Answered questions, with repetitions."""
    skipped: int
    repeated: int
    """Questions that one voter answered twice."""
    agreed: int
    """Those with the same answer both times."""
    decided: int
    """Pairs with a better picture."""
    left: int
    """Those whose left picture is the better one."""
    ties: int
    seconds: float
    """Median time of a vote."""

    @property
    def agreement(self) -> float:
        """Share of repeated questions with the same answer."""
        return self.agreed / self.repeated if self.repeated else math.nan

    @property
    def error_rate(self) -> float:
        """Rate e of wrong votes that explains the agreement: (1 - e)² + e² is the agreement.

        It is what `objective.label_smoothing` of DPO takes.
        """
        return (1 - math.sqrt(max(0.0, 2 * self.agreement - 1))) / 2

    def lines(self) -> list[str]:
        """Return the figures as sentences."""
        lines = [f"{self.votes} votes, {self.skipped} skipped; {self.seconds:.1f} s per vote."]
        if self.repeated:
            low, high = proportion_interval(self.agreed, self.repeated)
            lines.append(
                f"{self.agreed} of {self.repeated} repeated questions have the same answer "
                f"(95 % interval {low:.2f} to {high:.2f})."
            )
        if self.repeated >= ENOUGH and 0 < self.error_rate < 0.5:
            lines.append(
                f"That is a rate of wrong votes of {self.error_rate:.2f}: for dpo, write "
                f"objective.label_smoothing: {self.error_rate:.2f}."
            )
        if self.decided:
            low, high = proportion_interval(self.left, self.decided)
            lines.append(
                f"The left picture won {self.left} of {self.decided} pairs "
                f"(95 % interval {low:.2f} to {high:.2f}); {self.ties} are ties."
            )
        return lines


def habits(votes: Sequence[Vote]) -> Habits:
    """Measure the habits of the voters of some votes."""
    answered = [vote for vote in votes if vote.labels is not None]
    repeated, agreed = 0, 0
    twice: dict[tuple[str, str, frozenset[VotedPicture]], list[Vote]] = defaultdict(list)
    for vote in answered:
        twice[vote.voter, vote.prompt, vote.question].append(vote)
    for first, second, *_ in (pair for pair in twice.values() if len(pair) > 1):
        repeated += 1
        agreed += all(first.label_of(p) == second.label_of(p) for p in first.pictures)
    labels = [vote.labels for vote in answered if vote.labels is not None]
    pairs = [pair for pair in labels if len(pair) == 2]
    return Habits(
        votes=len(answered),
        skipped=len(votes) - len(answered),
        repeated=repeated,
        agreed=agreed,
        decided=sum(pair[0] != pair[1] for pair in pairs),
        left=sum(pair[0] > pair[1] for pair in pairs),
        ties=sum(pair[0] == pair[1] for pair in pairs),
        seconds=median([vote.seconds for vote in answered] or [0.0]),
    )
