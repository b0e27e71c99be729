"""Vote files: what people chose among pictures, as JSON lines.

The first line may describe how flowalign made the pictures. Each further line is the answer to one
question: a prompt, its pictures, and one label per picture, where a larger label is a better
picture. Pictures are named by their keys, by files relative to the vote file, or by both.
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flowalign.data.examples import (
    beside,
    Drawn,
    Example,
    ImageKey,
    Picture,
    picture_reader,
    Question,
    VoteSource,
)
from flowalign.data.prompts import Metadata, Prompt, read_objects
from flowalign.errors import UserError
from flowalign.files import write_file

Labels = tuple[float, ...]


@dataclass(frozen=True, eq=False)
class VotedPicture:
    """A picture that was voted on. Equal keys are one picture, whether it was stored or not."""

    key: ImageKey | None = None
    """The numbers that its noise depends on, if flowalign made it."""
    file: str | None = None
    """Its file, relative to the vote file, if it was stored."""

    @property
    def identity(self) -> ImageKey | str | None:
        """Its key, or else its file."""
        return self.key or self.file

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VotedPicture) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)


@dataclass(frozen=True, kw_only=True)
class Vote:
    """The answer of a voter to one question."""

    prompt: str
    pictures: tuple[VotedPicture, ...]
    labels: Labels | None
    """One number for each picture, from -1 for bad to 1 for good; None if it was skipped."""
    voter: str = ""
    place: int = -1
    """Number of the question in the order in which the voter was asked; -1 if it is not known."""
    seconds: float = 0.0
    """How long the voter looked."""
    time: str = ""
    """When the vote was cast, in UTC."""
    metadata: Metadata = field(default_factory=dict)
    """The extra fields of the prompt."""
    where: str = field(default="", compare=False)
    """The words that name its line in an error."""

    @property
    def question(self) -> frozenset[VotedPicture]:
        """The pictures in any order, which tell whether two votes answer one question."""
        return frozenset(self.pictures)

    def label_of(self, picture: VotedPicture) -> float:
        """Return the label of a picture. The vote must not have been skipped."""
        assert self.labels is not None
        return self.labels[self.pictures.index(picture)]


@dataclass(frozen=True)
class VoteFile:
    """The content of a vote file."""

    path: Path
    source: VoteSource | None
    """None if the pictures are given files."""
    votes: list[Vote]


def is_vote_file(path: Path) -> bool:
    """Return True for a `.jsonl` file whose first line is a source or a vote."""
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    with path.open("rb") as file:
        line = file.readline(1_000_000)
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return False
    if not isinstance(entry, dict):
        return False
    source = entry.get("source")
    # Other files have these names too: TRL's `labels`, or a text `source`.
    is_source = isinstance(source, dict) and "weights" in source
    return is_source or ("labels" in entry and "pictures" in entry)


def read_votes(path: str | Path, key: str) -> VoteFile:
    """Read a vote file. Raises UserError with `key`, the file and the line if one is wrong."""
    objects = read_objects(Path(path), key)
    source = None
    if objects and "pictures" not in objects[0][0] and "source" in objects[0][0]:
        (entry, where), *objects = objects
        source = _source(entry["source"], where)
    return VoteFile(Path(path), source, [_vote(entry, where) for entry, where in objects])


def _source(entry: Any, where: str) -> VoteSource:
    try:
        return VoteSource(**entry)
    except TypeError as error:
        raise UserError(
            f"{where} does not say how the pictures were made ({error}). Restore the line, or "
            "remove it and the keys."
        ) from None


def _vote(entry: Metadata, where: str) -> Vote:
    prompt, pictures, labels = (entry.get(name) for name in ("prompt", "pictures", "labels"))
    if not isinstance(prompt, str) or not isinstance(pictures, list) or not pictures:
        raise UserError(
            f"{where} is not a vote. Write a prompt, pictures and labels, such as "
            '{"prompt": "a red circle", "pictures": [{"file": "a.png"}, {"file": "b.png"}], '
            '"labels": [1, -1]}.'
        )
    if labels is not None and not _are_labels(labels, len(pictures)):
        raise UserError(
            f"{where} has {len(pictures)} picture(s) and the labels {labels!r}. Write one number "
            "from -1 to 1 for each picture."
        )
    voted = tuple(_picture(picture, where) for picture in pictures)
    place, seconds = entry.get("place", -1), entry.get("seconds", 0)
    if len(set(voted)) < len(voted):
        raise UserError(f"{where} names a picture twice. Write each picture once.")
    if not isinstance(place, int) or not isinstance(seconds, int | float):
        raise UserError(
            f"{where} has the place {place!r} and the seconds {seconds!r}. Write numbers, or "
            "remove both."
        )
    return Vote(
        prompt=prompt,
        pictures=voted,
        labels=None if labels is None else tuple(map(float, labels)),
        voter=str(entry.get("voter", "")),
        place=place,
        seconds=float(seconds),
        time=str(entry.get("time", "")),
        metadata=entry.get("metadata") or {},
        where=where,
    )


def _are_labels(labels: object, count: int) -> bool:
    if not isinstance(labels, list) or len(labels) != count:
        return False
    numbers = [label for label in labels if isinstance(label, int | float)]
    return len(numbers) == count and all(-1 <= number <= 1 for number in numbers)


def _picture(entry: object, where: str) -> VotedPicture:
    if isinstance(entry, str):
        return VotedPicture(file=entry)
    entry = entry if isinstance(entry, dict) else {}
    key, file = entry.get("key"), entry.get("file")
    is_key = isinstance(key, list) and len(key) == 4 and all(isinstance(n, int) for n in key)
    if (key is not None and not is_key) or not (is_key or isinstance(file, str)):
        raise UserError(
            f"{where} names a picture by {entry!r}. Write its file, or the four numbers of its key."
        )
    return VotedPicture(ImageKey(*key) if isinstance(key, list) else None, file)


def vote_line(vote: Vote) -> str:
    """Return a vote as a line of a vote file."""
    entry = {
        "prompt": vote.prompt,
        "pictures": [
            {name: value for name, value in asdict(picture).items() if value is not None}
            for picture in vote.pictures
        ],
        "labels": vote.labels,
        "voter": vote.voter,
        "place": vote.place,
        "seconds": vote.seconds,
        "time": vote.time,
    }
    if vote.metadata:
        entry["metadata"] = vote.metadata
    return json.dumps(entry, ensure_ascii=False)


def write_votes(file: VoteFile) -> None:
    """Write a vote file in place of the present one."""
    lines = [] if file.source is None else [json.dumps({"source": asdict(file.source)})]
    lines += [vote_line(vote) for vote in file.votes]
    write_file(file.path, "".join(f"{line}\n" for line in lines).encode())


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The votes on two pictures of a question. Each voter counts as one."""

    better: VotedPicture
    worse: VotedPicture
    gap: float
    """Difference of their mean labels, not below 0."""
    won: float
    """Share of votes for `better`."""
    tied: float
    """Share of votes for neither."""
    lost: float
    """Share of votes for `worse`."""


def answers(votes: Iterable[Vote]) -> list[list[Vote]]:
    """Return the votes by question, in the order of the file, without skipped ones."""
    groups: dict[tuple[str, frozenset[VotedPicture]], list[Vote]] = defaultdict(list)
    for vote in votes:
        if vote.labels is not None:
            groups[vote.prompt, vote.question].append(vote)
    return list(groups.values())


def outcomes(votes: Sequence[Vote]) -> list[Outcome]:
    """Return the outcome of every two pictures of one question, in the order of its first vote."""
    return [
        _outcome(votes, first, second)
        for first, second in itertools.combinations(votes[0].pictures, 2)
    ]


def _outcome(votes: Sequence[Vote], first: VotedPicture, second: VotedPicture) -> Outcome:
    differences: dict[str, list[float]] = defaultdict(list)
    for vote in votes:
        differences[vote.voter].append(vote.label_of(first) - vote.label_of(second))
    # A voter who was asked twice still counts once.
    by_voter = [np.array(values) for values in differences.values()]
    gap = float(np.mean([values.mean() for values in by_voter]))
    won = float(np.mean([(values > 0).mean() for values in by_voter]))
    lost = float(np.mean([(values < 0).mean() for values in by_voter]))
    if gap < 0:
        first, second, gap, won, lost = second, first, -gap, lost, won
    return Outcome(
        better=first, worse=second, gap=gap, won=won, tied=max(0.0, 1 - won - lost), lost=lost
    )


def mean_labels(votes: Sequence[Vote]) -> dict[VotedPicture, float]:
    """Return the mean label of each picture of one question. Each voter counts as one."""
    labels: dict[VotedPicture, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for vote in votes:
        for picture in vote.pictures:
            labels[picture][vote.voter].append(vote.label_of(picture))
    return {
        picture: float(np.mean([np.mean(values) for values in by_voter.values()]))
        for picture, by_voter in labels.items()
    }


def pair_examples(file: VoteFile, ties: bool) -> list[Example]:
    """Return a pair for every two pictures of a question whose mean labels differ (D3PO's rule).

    With `ties`, shares of ties stay with the pairs, and pairs that most voters call equal are
    included. Otherwise ties are left out.
    """
    examples = []
    for votes in answers(file.votes):
        for outcome in outcomes(votes):
            decided = outcome.won + outcome.lost
            if not outcome.gap and not (ties and outcome.tied):
                continue
            examples.append(
                Example(
                    prompt=Prompt(votes[0].prompt, votes[0].metadata),
                    chosen=_as_picture(file, votes[0], outcome.better),
                    rejected=_as_picture(file, votes[0], outcome.worse),
                    gap=outcome.gap,
                    preference=outcome.won / decided if decided else 0.5,
                    tie=outcome.tied if ties else 0.0,
                    where=votes[0].where,
                )
            )
    return examples


def liked_examples(file: VoteFile) -> list[Example]:
    """Return an example for each picture whose mean label is not 0: liked, or disliked."""
    examples = []
    for votes in answers(file.votes):
        for picture, label in mean_labels(votes).items():
            if not label:
                continue
            examples.append(
                Example(
                    prompt=Prompt(votes[0].prompt, votes[0].metadata),
                    chosen=_as_picture(file, votes[0], picture),
                    liked=label > 0,
                    gap=abs(label),
                    where=votes[0].where,
                )
            )
    return examples


def _as_picture(file: VoteFile, vote: Vote, picture: VotedPicture) -> Picture:
    stored = picture.file and picture_reader(beside(file.path, picture.file), vote.where)
    if picture.key is None:
        assert stored
        return stored
    # In the order in which they were sampled, which the page may have changed.
    keys = sorted(entry.key for entry in vote.pictures if entry.key)
    if file.source is None:
        raise UserError(
            f"{vote.where} names pictures by their keys, but the first line of {file.path} does "
            "not say how they were made. Restore it, or name the pictures by their files."
        )
    question = Question(Prompt(vote.prompt, vote.metadata), tuple(keys), file.source)
    return Drawn(question, keys.index(picture.key), stored or None)
