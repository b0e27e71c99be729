"""Vote files: what is read from them, and how the votes of several people are joined."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from flowalign.data.examples import Drawn, ImageKey
from flowalign.data.preferences import PAIRS, PICTURES, read_examples, Reading
from flowalign.data.votes import (
    answers,
    outcomes,
    read_votes,
    Vote,
    VotedPicture,
    VoteFile,
    write_votes,
)
from flowalign.errors import UserError

LIKES, TIES = Reading(paired=True, likes=True), Reading(paired=True, ties=True)
SOURCE = {
    **{"model": "m", "merge": [], "weights": "0", "height": 8, "width": 8},
    **{"sampler": {}, "environment": {}},
}


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in "abcd":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    return tmp_path


def vote(names: str, *labels: float | None, voter: str = "anna") -> Vote:
    """A vote on the pictures of these letters; without labels it is skipped."""
    pictures = tuple(VotedPicture(file=f"{name}.png") for name in names)
    known = tuple(label for label in labels if label is not None)
    return Vote(prompt="p", pictures=pictures, labels=known or None, voter=voter)


def stored(folder: Path, *votes: Vote) -> str:
    write_votes(VoteFile(folder / "votes.jsonl", None, list(votes)))
    return str(folder / "votes.jsonl")


def names(path: str, reading: Reading) -> list[tuple[str, ...]]:
    """The letters of the pictures of each example."""
    return [
        tuple(Path(picture.args[0]).stem for picture in example.pictures)  # pyright: ignore
        for example in read_examples(path, "data.pairs", reading)
    ]


def test_a_vote_file_is_read_as_it_was_written(folder):
    key = VotedPicture(ImageKey(1, 2, 3, 4), "a.png")
    first = Vote(
        prompt="a\u2028b",
        pictures=(key, VotedPicture(file="b.png")),
        labels=(1.0, -1.0),
        voter="anna",
        place=0,
        seconds=1.5,
        time="2026-01-01T00:00:00+00:00",
        metadata={"tag": "x"},
    )
    path = stored(folder, first, vote("ab"))
    assert read_votes(path, "data.pairs").votes == [first, vote("ab")]


def test_pictures_with_unequal_mean_labels_are_pairs(folder):
    """One best and one worst of four give 5 of 6 pairs, all but the two in the middle."""
    path = stored(folder, vote("abcd", 1, 0, -1, 0))
    assert names(path, PAIRS) == [("a", "b"), ("a", "c"), ("a", "d"), ("b", "c"), ("d", "c")]
    assert [e.gap for e in read_examples(path, "data.pairs", PAIRS)] == [1, 2, 1, 1, 1]


def test_voters_who_contradict_each_other_give_no_pair(folder):
    votes = [vote("ab", 1, -1), vote("ba", 1, -1, voter="ben"), vote("cd", 1, -1)]
    assert names(stored(folder, *votes), PAIRS) == [("c", "d")]


def test_two_of_three_voters_are_a_preference_of_two_thirds(folder):
    votes = [vote("ab", 1, -1, voter=name) for name in ("anna", "ben")]
    path = stored(folder, *votes, vote("ba", 1, -1, voter="cleo"))
    (example,) = read_examples(path, "data.pairs", PAIRS)
    assert (example.preference, example.tie) == (pytest.approx(2 / 3), 0)


def test_a_voter_who_is_asked_twice_counts_once(folder):
    votes = [vote("ab", 1, -1), vote("ba", -1, 1), vote("ab", -1, 1, voter="ben")]
    (joined,) = answers(read_votes(stored(folder, *votes), "data.pairs").votes)
    (outcome,) = outcomes(joined)
    assert (outcome.won, outcome.lost, outcome.gap) == (0.5, 0.5, 0)


def test_ties_are_pairs_only_for_an_objective_that_learns_from_them(folder):
    path = stored(folder, vote("ab", 0, 0), vote("cd", 1, -1), vote("cd", 0, 0, voter="ben"))
    assert names(path, PAIRS) == [("c", "d")]
    examples = read_examples(path, "data.pairs", TIES)
    assert [(e.preference, e.tie) for e in examples] == [(0.5, 1), (1, 0.5)]


def test_likes_are_single_pictures_and_liked_ones_are_imitated(folder):
    path = stored(folder, vote("a", 1), vote("b", -1), vote("c"), vote("cd", -1, -1))
    examples = read_examples(path, "data.pairs", LIKES)
    assert [example.liked for example in examples] == [True, False, False, False]
    assert names(path, LIKES) == [("a",), ("b",), ("c",), ("d",)]
    assert names(path, PICTURES) == [("a",)]


def test_pictures_with_keys_belong_to_their_question_in_the_order_of_the_keys(folder):
    keys = [ImageKey(0, 7, 3, image) for image in (1, 0)]
    pictures = tuple(VotedPicture(key) for key in keys)
    turned = Vote(prompt="p", pictures=pictures, labels=(1.0, -1.0))
    line = {"source": SOURCE}
    path = folder / "votes.jsonl"
    stored(folder, turned)
    path.write_text(json.dumps(line) + "\n" + path.read_text())
    (example,) = read_examples(str(path), "data.pairs", PAIRS)
    assert isinstance(example.chosen, Drawn)
    assert example.chosen.question.keys == (keys[1], keys[0])
    assert example.chosen.row == 1
    assert example.rejected == replace(example.chosen, row=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"labels": [1], "pictures": []}, "is not a vote. Write a prompt, pictures and labels"),
        (
            {"prompt": "p", "pictures": ["a.png"], "labels": [1, 0]},
            r"Write one number from -1 to 1",
        ),
        ({"prompt": "p", "pictures": ["a.png"], "labels": [2]}, r"Write one number from -1 to 1"),
        ({"prompt": "p", "pictures": [{}], "labels": [1]}, "Write its file, or the four numbers"),
        ({"prompt": "p", "pictures": ["x.png"], "labels": [1]}, r"the image .*x\.png does not"),
        (
            {"prompt": "p", "pictures": [{"key": [0, 0, 0, 0]}], "labels": [1]},
            "does not say how they were made",
        ),
        ({"source": {"weights": "0"}}, "does not say how the pictures were made"),
    ],
)
def test_a_wrong_line_is_answered_with_what_to_write(folder, line, message):
    (folder / "votes.jsonl").write_text(json.dumps(line))
    with pytest.raises(UserError, match=message):
        read_examples(str(folder / "votes.jsonl"), "data.pairs", LIKES)
