"""Figures of held-out likes and dislikes."""

import pytest
import torch

from flowalign.evaluation.held_out import distance_from_other_kind, share_of_other_kind

LIKED = torch.tensor([True, True, False, False, False])


def test_a_drift_of_all_pictures_changes_neither_figure():
    gain = torch.tensor([0.5, -0.1, -0.2, 0.1, -0.5])
    for figure in (distance_from_other_kind, share_of_other_kind):
        assert figure(gain, LIKED) == pytest.approx(figure(gain - 3, LIKED), abs=1e-6)


def test_margins_are_distances_from_the_middle_of_both_kinds():
    gain = torch.tensor([0.5, 0.1, -0.2, 0.0, -0.1])
    # The means are 0.3 and -0.1.
    assert distance_from_other_kind(gain, LIKED).tolist() == pytest.approx(
        [0.4, 0.0, 0.3, 0.1, 0.2], abs=1e-6
    )
    assert share_of_other_kind(gain, LIKED).tolist() == [1, 1, 1, 1, 1]


def test_one_kind_alone_keeps_its_gains_and_sides_with_half():
    gain, liked = torch.tensor([0.5, -0.1]), torch.tensor([True, True])
    assert torch.equal(distance_from_other_kind(gain, liked), gain)
    assert share_of_other_kind(gain, liked).tolist() == [0.5, 0.5]
