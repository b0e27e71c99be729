"""Curves: every metric, from the value before training to the last step."""

from flowalign.reporting.curves import Logged, make_curves, MOST_POINTS
from tests.reporting.pages import metrics


def curves_of(*runs, guided=None):
    return {c.name: c for _, group in make_curves(runs, guided or {}) for c in group}


def test_every_metric_has_a_curve_that_begins_with_the_evaluation_before():
    entries = [{**entry, "eval/r": 0.5} for entry in metrics(2)]
    curves = curves_of(Logged(label="run", entries=entries, before={"eval/r": 0.25}))
    assert list(curves) == ["eval/r", "reward/combined", "loss"]
    assert curves["eval/r"].lines[0].points == [(0, 0.25, 0), (8, 0.5, 1), (16, 0.5, 2)]
    assert curves["loss"].lines[0].points == [(8, 1.0, 1), (16, 0.5, 2)]
    assert curves["eval/r"].description == "eval/r over images: run from 0.25 to 0.5"


def test_a_curve_runs_from_the_left_margin_to_the_right_one_and_leaves_out_what_is_not_finite():
    entries = [{"step": 0, "loss": 1.0}, {"step": 1, "loss": None}, {"step": 4, "loss": 3.0}]
    (curve,) = curves_of(Logged(label="run", entries=entries)).values()
    assert curve.axis == "step"
    # The range of values has 6 % of space on both sides, in 156 pixels of height.
    assert curve.lines[0].path == "M48.0 157.6L328.0 18.4"
    assert [tick.text for tick in curve.y_ticks] == ["1", "2", "3"]


def test_a_long_run_shows_means_of_steps_in_a_row():
    entries = [
        {"step": n, "images": n, "loss": float(n % 2)} for n in range(1, 4 * MOST_POINTS + 1)
    ]
    (curve,) = curves_of(Logged(label="run", entries=entries)).values()
    points = curve.lines[0].points
    assert len(points) == MOST_POINTS
    assert points[0] == (4, 0.5, 4)
    assert points[-1] == (4 * MOST_POINTS, 0.5, 4 * MOST_POINTS)


def test_runs_without_images_are_drawn_over_steps_beside_others():
    made, given = metrics(3), metrics(2, axis=0)
    runs = [Logged(label="made", entries=made), Logged(label="given", entries=given)]
    curve = curves_of(*runs)["loss"]
    assert curve.axis == "step"
    assert [(line.label, line.color, len(line.points)) for line in curve.lines] == [
        ("made", 0, 3),
        ("given", 1, 2),
    ]


def test_the_guided_base_is_a_line_inside_the_picture():
    entries = [{**entry, "eval/r": 0.5} for entry in metrics(2)]
    curve = curves_of(Logged(label="run", entries=entries), guided={"eval/r": 2.0})["eval/r"]
    assert 10 < curve.guided < curve.lines[0].marks[0][1]
