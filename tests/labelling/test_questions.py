"""What a voter is asked, and in which order."""

import math
from collections import Counter

import pytest

from flowalign.data.votes import Vote, VotedPicture
from flowalign.labelling.agreement import habits
from flowalign.labelling.questions import labels_of, LEAST_DISTANCE, places
from flowalign.rewards.accuracy import proportion_interval


def test_every_question_is_asked_once_and_one_in_ten_again_in_the_reverse_order():
    asked = places(questions=200, pictures=2, seed=0, voter="anna")
    counts = Counter(place.question for place in asked)
    assert set(counts) == set(range(200))
    assert Counter(counts.values()) == {1: 180, 2: 20}
    for question in (question for question, count in counts.items() if count == 2):
        first, again = (n for n, place in enumerate(asked) if place.question == question)
        assert asked[again].order == asked[first].order[::-1]
        assert again - first >= LEAST_DISTANCE


def test_sides_are_random_and_differ_between_voters():
    orders = {
        voter: [place.order for place in places(100, 2, 0, voter)] for voter in ("anna", "ben")
    }
    assert orders["anna"] != orders["ben"]
    low, high = proportion_interval(sum(order == (0, 1) for order in orders["anna"]), 110)
    assert low < 0.5 < high
    assert orders["anna"] == [place.order for place in places(100, 2, 0, "anna")]


@pytest.mark.parametrize(
    ("mode", "choice", "labels"),
    [
        ("pair", "left", (1, -1)),
        ("pair", "right", (-1, 1)),
        ("pair", "tie", (0, 0)),
        ("pair", "both_bad", (-1, -1)),
        ("pair", "skip", None),
        ("thumbs", "dislike", (-1,)),
        ("group", "2,0", (-1, 0, 1, 0)),
        ("group", "skip", None),
    ],
)
def test_a_choice_labels_the_pictures(mode, choice, labels):
    pictures = {"pair": 2, "thumbs": 1, "group": 4}[mode]
    assert labels_of(mode, choice, pictures) == labels


@pytest.mark.parametrize(
    ("mode", "choice"), [("pair", "like"), ("group", "1,1"), ("group", "0,4"), ("group", "x")]
)
def test_another_choice_is_refused(mode, choice):
    with pytest.raises(ValueError, match=choice):
        labels_of(mode, choice, 4)


def test_wilson_s_interval_has_its_published_values():
    """70 % of 50 pairs are .56 to .81, and 25 pairs at .70 are just above one half."""
    assert proportion_interval(35, 50) == pytest.approx((0.562, 0.809), abs=1e-3)
    assert proportion_interval(17.5, 25)[0] == pytest.approx(0.5, abs=0.01)
    assert proportion_interval(0, 0) == (0, 1)


def test_agreement_gives_the_rate_of_wrong_votes():
    """An agreement of .8 is a rate of .113, for which (1 - e)² + e² is .8."""
    pictures = [tuple(VotedPicture(file=f"{n}{side}") for side in "ab") for n in range(10)]
    votes = [Vote(prompt="", pictures=two, labels=(1.0, -1.0)) for two in pictures]
    again = [
        Vote(prompt="", pictures=two[::-1], labels=(1.0, -1.0) if n < 2 else (-1.0, 1.0))
        for n, two in enumerate(pictures)
    ]
    measured = habits([*votes, *again])
    assert (measured.repeated, measured.agreed, measured.left) == (10, 8, 12)
    assert measured.error_rate == pytest.approx(0.1127, abs=1e-4)
    assert math.isnan(habits(votes).agreement)
