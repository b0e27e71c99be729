"""report.html: complete, self-contained, and harmless whatever names and prompts it shows."""

import json
import re
from dataclasses import replace

import pytest
import torch

from flowalign.config.changes import Changes
from flowalign.data.prompts import Prompt
from flowalign.reporting import cards
from flowalign.reporting.cards import make_cards
from flowalign.reporting.html import report_page, sides_of, write_report
from flowalign.reporting.page import render
from flowalign.reporting.record import Snippet
from flowalign.reporting.summary import guidance_note, result_notes
from flowalign.reporting.tags import tag_tables
from flowalign.reporting.verdict import verdict
from tests.hostile import assert_harmless, Page
from tests.reporting.pages import guided_summary, PROMPTS, record, result, summary

HOSTILE = "<script>alert('x')</script>\u2028<!--<script>"


def page_of(run, **changes):
    """The text of a page, and its tags as a browser reads them."""
    page = report_page(run.name, run, summary(**changes), None)
    return Page(render(page).decode())


def test_the_report_shows_figures_pictures_curves_settings_and_the_adapter(tmp_path):
    run = record(
        changes=Changes(parent="base.yaml", settings={"train.steps": ("50", "2")}),
        snippets=[Snippet("diffusers", "pipe.load_lora_weights('a')")],
    )
    write_report(tmp_path, run, summary())
    page = assert_harmless((tmp_path / "report.html").read_text(encoding="utf-8"))
    for text in (
        "crd on assets/tiny-sd3. Finished after 14,400 images in 1.5 minutes.",
        "scene_match went from 0.250 to 0.750: better than the base (+0.500 ± 0.100).",
        "rest on 43 prompts.",
        "a circle",
        "eval/scene_match",
        "What differs from base.yaml:",
        "train.steps502",
        "train: {steps: 2}",
        "pipe.load_lora_weights('a')",
    ):
        assert text in page.text
    # Three prompts before and after, and again in the gallery through training.
    assert page.count("img") == 2 * 3 + 2 * 3
    assert page.count("svg") == 3
    alts = [value for name, value in page.attributes if name == "alt"]
    assert alts[:2] == ["base: a circle", "trained: a circle"]


def test_a_page_asks_no_other_server_and_runs_its_own_script_alone():
    text = render(report_page("run", record(), summary(), None)).decode()
    assert not re.search(r"url\(|@import|https?://", text)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert re.fullmatch(
        r"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-\S+'",
        policy,
    )


def test_whatever_the_user_wrote_is_escaped():
    prompts = [Prompt(HOSTILE, {"tag": HOSTILE}), *PROMPTS[1:]]
    run = record(
        HOSTILE,
        run=HOSTILE,
        model=HOSTILE,
        config=HOSTILE,
        environment=HOSTILE,
        prompts=prompts,
        snippets=[Snippet(HOSTILE, HOSTILE)],
        changes=Changes(parent=HOSTILE, settings={HOSTILE: (HOSTILE, HOSTILE)}),
        metrics=[{"step": 1, "images": 8, HOSTILE: 1.0}],
    )
    changes = {"name": HOSTILE, "baseline_guided": guided_summary(HOSTILE)}
    text = render(report_page("run", run, summary(**changes), (HOSTILE, 1))).decode()
    page = assert_harmless(text)
    assert page.text.count(HOSTILE) > 20
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1]
    assert json.loads(data)["curves"][0]["lines"][0]["label"] == HOSTILE


def test_prompts_that_no_encoding_has_are_replaced():
    text = render(report_page("run", record(prompts=[Prompt("half \ud83d")]), summary(), None))
    assert b"half ?" in text


@pytest.mark.parametrize("lacking", ["before", "after", "prompts", "metrics", "steps"])
def test_a_run_that_lacks_a_part_still_has_a_page(lacking):
    nothing = {"before": None, "after": None, "prompts": [], "metrics": [], "steps": {}}
    run = record(**{lacking: nothing[lacking]})
    page = page_of(run, after={}, difference={}, stopped="running", step=1)
    assert "Still training: 14,400 images" in page.text
    assert "The trained weights have not been evaluated yet." in page.text
    assert ("prompt 1" in page.text) == (lacking == "prompts")


def test_a_run_on_given_pictures_counts_steps_and_held_out_entries():
    page = page_of(record(), name="chosen_preferred", images=0, prompts=0, held_out=3)
    assert "Finished after 2 steps in 1.5 minutes" in page.text
    assert "rest on 3 held-out entries. Use 20 or more for a narrow interval." in page.text
    assert "0 images" not in page.text


def test_the_guided_base_is_a_column_a_side_a_line_and_a_sentence():
    run = record(guided=result((0.5, 0.5, 0.5), level=90))
    page = page_of(run, baseline_guided=guided_summary())
    for text in (
        "scorebaseguidedtrainedtrained \u2212 basetrained \u2212 guided",
        "scene_match0.2500.3750.750+0.500 ± 0.100+0.375 ± 0.125",
        "and better than the base at its best guidance (+0.375 ± 0.125).",
        "Guided is the base at guidance 3, the best of 1, 3, 7 by scene_match on 43 prompts",
        "guided base",
    ):
        assert text in page.text
    assert "guided base" not in page_of(record()).text


def test_a_base_whose_own_guidance_is_best_is_one_column():
    page = page_of(record(), baseline_guided=guided_summary(guidance=1.0))
    assert "trained \u2212 guided" not in page.text
    assert "sampled at guidance 1, for the base the best of 1, 3, 7" in page.text


def test_the_first_sentences_say_what_improved_and_what_fell():
    differences = {"a": (0.1, 0.2, 0.3), "b": (-0.3, -0.2, -0.1), "c": (-0.1, 0.0, 0.1)}
    means = dict.fromkeys("abc", 0.5)
    content = summary(before=means, after=means, difference=differences)
    first, *others = verdict(content, "c", frozenset())
    assert (
        first == "c went from 0.500 to 0.500: not clearly different from the base (+0.000 ± 0.100)."
    )
    assert others == [
        "Also better than the base: a (+0.200 ± 0.100).",
        "Worse than the base: b (-0.200 ± 0.100).",
    ]
    # An error that falls is an improvement.
    assert verdict(content, "a", frozenset("b"))[1:] == [
        "Also better than the base: b (-0.200 ± 0.100).",
        "No other score became clearly worse.",
    ]


def test_each_tag_has_a_row_with_the_difference_of_its_own_prompts():
    sides = sides_of(record())
    (table,) = tag_tables(sides, [(1, 0)], PROMPTS)
    rows = [[cell.text for cell in row] for row in table.rows]
    # The first tag: 0.25 and 0.75 become 0.5 and 0.75. The second has one prompt, of one image.
    assert [row[:4] for row in rows] == [
        ["one", "2", "0.500", "0.625"],
        ["two", "1", "0.500", "0.250"],
    ]
    assert rows[0][4].startswith("+0.125 ± ")
    assert rows[1][4] == "-0.250 ± unknown"
    assert tag_tables(sides, [(1, 0)], PROMPTS[:1]) == []


def test_a_card_has_the_scores_of_its_picture_and_the_means_of_its_prompt():
    one = result((0.0, 0.5, 1.0))
    two = replace(
        one,
        prompt=torch.tensor([0, 0, 0, 1]),
        rewards={"r": torch.tensor([1.0, 0, torch.nan, 0.25])},
    )
    two.thumbnails = {0: one.thumbnails[0], 3: one.thumbnails[1]}
    (side,) = sides_of(record(before=two, after=None))
    first, second = make_cards([side], PROMPTS)
    assert [(name, list(map(tuple, scores))) for name, scores in first.scores] == [
        ("r", [("1.000", "0.500")])
    ]
    assert (first.means, second.means) == ([[0.5]], [[0.25]])
    assert second.scores[0][1][0] == ("0.250", "")


def test_the_pictures_of_a_page_are_bounded_and_spread(monkeypatch):
    sides = sides_of(record())
    whole = sum(len(file) for side in sides for file in side.result.thumbnails.values())
    monkeypatch.setattr(cards, "PICTURE_BYTES", whole // 2)
    shown = [bool(card.pictures) for card in make_cards(sides, PROMPTS)]
    assert shown == [True, False, True]


def test_a_damaged_picture_is_left_out():
    before = result((0.5, 0.5, 0.5))
    before.thumbnails = {0: b"not a picture"}
    first, *_ = make_cards(sides_of(record(before=before)), PROMPTS)
    assert first.pictures[0] is None
    assert first.pictures[1].address.startswith("data:image/webp;base64,")


def test_votes_of_held_out_pairs_are_counted():
    margins = torch.tensor([0.5, 0.25, -0.5, 0.0])
    shares = torch.tensor([1.0, 1.0, 0.0, 0.5])
    before = result((0.5,), held_out={"margin": torch.zeros(4)})
    after = result((0.5,), held_out={"margin": margins, "chosen_preferred": shares})
    page = page_of(record(before=before, after=after))
    assert "The trained model sides with 62 % of 4 votes" in page.text
    assert page.count("rect") == 21
    assert "Held-out votes" not in page_of(record()).text


def test_the_largest_scale_that_was_tried_may_not_be_the_best():
    assert "add one to evaluation.guidance_sweep" in guidance_note(guided_summary(guidance=7.0))
    assert "add one" not in guidance_note(guided_summary(guidance=3.0))
    own = {**guided_summary(guidance=7.0), "own_guidance": 7.0}
    assert "add one to evaluation.guidance_sweep" in guidance_note(own)


@pytest.mark.parametrize(
    ("metric", "is_split"),
    [("eval/scene_match", True), ("eval/velocity_moved", False), ("reward/combined", False)],
)
def test_only_metrics_that_have_halves_choose_on_one(tmp_path, metric, is_split):
    (note,) = result_notes(tmp_path, summary(chosen_by=metric))
    assert f"was chosen by {metric}" in note
    assert ("on one half" in note) == is_split
    assert note.endswith("half." if is_split else "those of one half of the evaluation prompts.")
