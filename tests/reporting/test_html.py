"""report.html: complete, self-contained, and harmless whatever names and prompts it shows."""

import json
import re
import warnings
from html.parser import HTMLParser

import pytest
import torch

from flowalign.reporting.html import draw_curves, write_report
from flowalign.reporting.images import save_picture
from flowalign.reporting.summary import guidance_note, result_notes
from flowalign.reporting.trackers import JsonLines

HOSTILE = "<script>alert('x')</script>"


def summary(name="scene_match", **changes):
    scores = {
        "before": {name: 0.25},
        "after": {name: 0.75},
        "difference": {name: (0.4, 0.5, 0.6)},
    }
    scores |= {"baseline_guided": None, "prompts": 43, "held_out": 0}
    end = {"stopped": "finished", "step": 100, "chosen_by": "", "better_step": None}
    return {**scores, "images": 14400, "seconds": 90.0, **end, **changes}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "my run & <b>"
    save_picture(torch.zeros(3, 8, 8).byte(), folder / "pictures" / "before-after.png")
    (folder / "config.yaml").write_text(f'data: {{prompts: "{HOSTILE}"}}\n')
    (folder / "environment.json").write_text(json.dumps({"python": HOSTILE}))
    tracker = JsonLines(folder, 0)
    for step in (1, 2):
        tracker.log(step, {"images": 8 * step, "reward/combined": 0.1 * step, "loss": 1.0})
    return folder


def test_the_report_shows_figures_pictures_and_settings(run):
    write_report(run, summary())
    page = (run / "report.html").read_text()
    for text in (
        "Finished after 14,400 images in 1.5 minutes",
        "+0.500 ± 0.100",
        "rest on 43 prompts.",
    ):
        assert text in page
    # The sheet, and curves of the reward, the evaluation and the loss.
    assert page.count('src="data:image/png;base64,') == 1 + 3
    assert 'name="viewport"' in page


def test_a_run_on_given_pictures_counts_steps_and_held_out_entries(run):
    write_report(run, summary("chosen_preferred", images=0, prompts=0, held_out=3))
    page = (run / "report.html").read_text()
    assert "Finished after 2 steps in 1.5 minutes" in page
    assert "rest on 3 held-out entries. Use 20 or more for a narrow interval." in page
    assert "0 images" not in page


def guided(name="scene_match", guidance=3.0):
    """A base at a guidance of its own, beside a policy that samples without guidance."""
    return {
        "guidance": guidance,
        "own_guidance": 1.0,
        "setting": "guidance",
        "chosen_by": name,
        "chosen_on": 43,
        "sweep": {"1": 0.25, "7": 0.3, "3": 0.35},
        "means": {name: 0.375},
        "difference": {name: (0.25, 0.375, 0.5)},
    }


def test_the_guided_base_is_a_column_a_line_and_a_sentence(run):
    write_report(run, summary())
    without = draw_curves([], summary())
    write_report(run, summary(baseline_guided=guided()))
    page = (run / "report.html").read_text()
    for text in (
        "<th>guided</th>",
        "<td>0.375</td>",
        "<td>+0.375 ± 0.125</td>",
        "Guided is the base at guidance 3, the best of 1, 3, 7 by scene_match on 43 prompts",
        "Base and trained are sampled at 1.",
    ):
        assert text in page
    assert draw_curves([], summary(baseline_guided=guided())) != without


def test_a_base_whose_own_guidance_is_best_is_one_column(run):
    write_report(run, summary(baseline_guided=guided(guidance=1.0)))
    page = (run / "report.html").read_text()
    assert "guided" not in page
    assert "sampled at guidance 1, for the base the best of 1, 3, 7" in page


def test_the_largest_scale_that_was_tried_may_not_be_the_best():
    assert "add one to evaluation.guidance_sweep" in guidance_note(guided(guidance=7.0))
    assert "add one" not in guidance_note(guided(guidance=3.0))
    own = {**guided(guidance=7.0), "own_guidance": 7.0}
    assert "add one to evaluation.guidance_sweep" in guidance_note(own)


@pytest.mark.parametrize(
    ("metric", "is_split"),
    [("eval/scene_match", True), ("eval/velocity_moved", False), ("reward/combined", False)],
)
def test_only_metrics_that_have_halves_choose_on_one(run, metric, is_split):
    (note,) = result_notes(run, summary(chosen_by=metric))
    assert f"was chosen by {metric}" in note
    assert ("on one half" in note) == is_split
    assert note.endswith("half." if is_split else "those of one half of the evaluation prompts.")


def test_whatever_the_user_wrote_is_escaped(run):
    write_report(run, summary(name=HOSTILE, baseline_guided=guided(HOSTILE)))
    page = (run / "report.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 3
    assert "my run &amp; &lt;b&gt;" in page


def test_the_report_asks_no_other_server(run):
    write_report(run, summary())
    addresses = []

    class Links(HTMLParser):
        def handle_starttag(self, tag, attributes):
            addresses.extend(value for name, value in attributes if name in ("src", "href"))

    Links().feed((run / "report.html").read_text())
    assert addresses
    assert all(address.startswith("data:") for address in addresses)
    assert not re.search(r"url\(|@import", (run / "report.html").read_text())


def test_a_metric_of_any_name_is_written_as_text(run):
    name = "\u7ea2 $x^{"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(run, summary(name=name))
    page = (run / "report.html").read_text(encoding="utf-8")
    assert f"<figcaption>eval/{name}</figcaption>" in page


def test_the_prompts_of_the_pictures_are_listed_as_text(run):
    write_report(run, summary(), ["\u7ea2\u8272\u7684\u5706", HOSTILE])
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<li>\u7ea2\u8272\u7684\u5706</li>" in page
    assert "<script" not in page


def test_a_run_without_images_is_drawn_over_steps():
    entries = [{"step": 1, "images": 0, "loss": 2.0}, {"step": 2, "images": 0, "loss": None}]
    names = [name for name, _ in draw_curves(entries, summary(images=0))]
    assert names == ["eval/scene_match", "loss"]


def test_the_figures_of_a_chosen_step_are_not_drawn_at_the_last_one():
    entries = [{"step": n, "images": 8 * n, "eval/scene_match": 0.5 - 0.1 * n} for n in (1, 2)]
    other = {"before": {"scene_match": 0.125}, "after": {"scene_match": 0.875}}
    last, chosen = summary(), summary(step=1, chosen_by="eval/scene_match")
    # The evaluations on the way are of all prompts, those of the summary of one half.
    assert draw_curves(entries, chosen) == draw_curves(entries, {**chosen, **other})
    assert draw_curves(entries, last) != draw_curves(entries, {**last, **other})
