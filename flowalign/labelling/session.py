"""A session of votes: what each voter is asked next, and the file that keeps the answers."""

import threading
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, UTC

from flowalign.data.votes import Vote, VoteFile, write_votes
from flowalign.labelling.active import ActiveChoice, CANDIDATES
from flowalign.labelling.agreement import Habits, habits
from flowalign.labelling.albums import Album
from flowalign.labelling.questions import labels_of, Place, places

AHEAD = 2
"""Questions whose pictures are made while the voter looks at the present one."""


@dataclass(frozen=True)
class Shown:
    """A question on the page."""

    place: int
    prompt: str
    pictures: int
    total: int
    """Questions of the voter, with repetitions."""
    done: int


class Session:
    """Votes of any number of voters on one album. Every vote is written at once."""

    def __init__(
        self,
        album: Album,
        file: VoteFile,
        mode: str,
        seed: int,
        choice: ActiveChoice | None = None,
    ):
        """Without a choice, questions are asked in their random order."""
        self.album, self.mode, self.seed, self.choice = album, mode, seed, choice
        self._file, self._lock = file, threading.Lock()
        self._choosing = threading.Lock()
        # By its pictures, a vote belongs to a question also if other questions were asked before.
        self._numbers = {
            frozenset(album.question(number).pictures): number for number in range(album.questions)
        }
        # One thread, because pictures of one model are made one after another.
        self._maker = ThreadPoolExecutor(1)
        self._pictures: dict[int, Future[list[bytes]]] = {}

    @property
    def file(self) -> VoteFile:
        """The vote file with all votes."""
        return self._file

    def next(self, voter: str) -> Shown | None:
        """Return the next question of a voter, or None after the last."""
        asked, answered = self._places(voter), self._answered(voter)
        missing = [place for place in range(len(asked)) if place not in answered]
        missing = self._chosen_first(voter, asked, missing)
        for number in missing[: AHEAD + 1]:
            self._load(asked[number].question)
        if not missing:
            return None
        place = missing[0]
        question = self.album.question(asked[place].question)
        done = len(asked) - len(missing)
        return Shown(place, question.prompt.text, len(question.pictures), len(asked), done)

    def _chosen_first(self, voter: str, asked: Sequence[Place], missing: list[int]) -> list[int]:
        """Return the places that are left, the one to ask next first."""
        if self.choice is None or not missing:
            return missing
        answers = self._answered(voter)
        answered = [(asked[place].question, vote) for place, vote in answers.items()]
        seen = {question for question, _ in answered}
        # A repetition is asked in its turn, and never before its question.
        if asked[missing[0]].question in seen:
            return missing
        new = [place for place in missing if asked[place].question not in seen]
        first = dict.fromkeys(asked[place].question for place in new)
        for question in [*first][: CANDIDATES + AHEAD]:
            self._load(question)
        with self._choosing:
            # Pictures are made by the one thread of the session, as all others are.
            number = [*first][self.choice([*first], answered, lambda n: self._load(n).result())]
        place = next(place for place in new if asked[place].question == number)
        return [place, *(other for other in missing if other != place)]

    def picture(self, voter: str, place: int, position: int) -> bytes:
        """Return the picture at a position of a question. Raises IndexError if there is none."""
        at = self._place(voter, place)
        return self._load(at.question).result()[at.order[position]]

    def vote(self, voter: str, place: int, choice: str, seconds: float) -> None:
        """Store the answer to a question; an earlier answer to it is replaced.

        Raises ValueError for a choice that the mode does not have, and IndexError for a place that
        the voter is not asked.
        """
        at = self._place(voter, place)
        asked = self.album.question(at.question)
        vote = Vote(
            prompt=asked.prompt.text,
            pictures=tuple(asked.pictures[position] for position in at.order),
            labels=labels_of(self.mode, choice, len(asked.pictures)),
            voter=voter,
            place=place,
            seconds=round(seconds, 2),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            metadata=asked.prompt.metadata,
        )
        answered = self._answered(voter)
        with self._lock:
            old = answered.get(place)
            self._store([*(one for one in self._file.votes if one is not old), vote])

    def undo(self, voter: str) -> None:
        """Remove the last vote of a voter, who is asked again."""
        with self._lock:
            numbers = [n for n, vote in enumerate(self._file.votes) if vote.voter == voter]
            if numbers:
                last = numbers[-1]
                self._store([*self._file.votes[:last], *self._file.votes[last + 1 :]])

    def habits(self, voter: str) -> Habits:
        """Measure the habits of a voter."""
        return habits(self._votes_of(voter))

    def close(self) -> None:
        """Stop making pictures."""
        self._maker.shutdown(wait=True, cancel_futures=True)

    def _votes_of(self, voter: str) -> list[Vote]:
        return [vote for vote in self._file.votes if vote.voter == voter]

    def _answered(self, voter: str) -> dict[int, Vote]:
        """Return the votes by the place of their question: first answers, then repetitions."""
        waiting: dict[int, list[int]] = defaultdict(list)
        for place, at in enumerate(self._places(voter)):
            waiting[at.question].append(place)
        answered = {}
        for vote in self._votes_of(voter):
            places_left = waiting.get(self._numbers.get(vote.question, -1), [])
            if places_left:
                answered[places_left.pop(0)] = vote
        return answered

    def _places(self, voter: str) -> Sequence[Place]:
        pictures = len(self.album.question(0).pictures)
        return places(self.album.questions, pictures, self.seed, voter)

    def _place(self, voter: str, number: int) -> Place:
        asked = self._places(voter)
        if not 0 <= number < len(asked):
            raise IndexError(f"There is no question {number}.")
        return asked[number]

    def _load(self, question: int) -> "Future[list[bytes]]":
        with self._lock:
            known = self._pictures.get(question)
            failed = known is not None and known.done() and known.exception() is not None
            if known is None or failed:
                self._pictures[question] = self._maker.submit(self.album.load, question)
            # The newest suffice: a session may last for thousands of questions.
            for old in list(self._pictures)[: -8 * (AHEAD + 1)]:
                del self._pictures[old]
            return self._pictures[question]

    def _store(self, votes: list[Vote]) -> None:
        self._file = replace(self._file, votes=votes)
        write_votes(self._file)
