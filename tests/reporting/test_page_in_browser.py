"""Reports in headless Chromium, at the width of a desk and of a phone."""

import io

import pytest
from PIL import Image

from flowalign.data.prompts import Prompt
from flowalign.reporting.html import report_page
from flowalign.reporting.page import render
from tests.browser import browser
from tests.reporting.pages import AFTER, BEFORE, guided_summary, PROMPTS, record, result, summary

__all__ = ["browser"]
LONG = "a very long prompt about " + "supercalifragilistic" * 5


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A report of 30 prompts, of which the first three have the scores of the other tests."""
    prompts = [*PROMPTS, Prompt(LONG, {"tag": "two"})]
    prompts += [Prompt(f"prompt {n}") for n in range(26)]
    more = (0.5,) * 27
    run = record(
        before=result((*BEFORE, *more), level=40),
        guided=result((*AFTER, *more), level=90),
        after=result((*AFTER, *more), level=200),
        prompts=prompts,
    )
    file = tmp_path_factory.mktemp("pages") / "report.html"
    content = summary(baseline_guided=guided_summary())
    file.write_bytes(render(report_page(file.parent, run, content, ("scene_match", 1))))
    return file


@pytest.fixture(params=[1400, 390])
def page(browser, file, request):
    """The page, whose console must stay empty, and which must not ask the network for anything."""
    context = browser.new_context(viewport={"width": request.param, "height": 800})
    page, problems = context.new_page(), []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.append(request.url[:40]))
    page.goto(file.as_uri())
    yield page
    addresses = (file.as_uri()[:40], "data:image/webp;base64,")
    assert [problem for problem in problems if not problem.startswith(addresses)] == []
    context.close()


def shown(page):
    """The prompts on the visible cards."""
    return page.locator(".card:visible figcaption > p:first-child").all_inner_texts()


def test_a_page_fits_its_width_and_every_picture_has_an_alt_text(page):
    width = "document.documentElement.scrollWidth <= window.innerWidth"
    assert page.evaluate(width)
    assert page.evaluate("[...document.images].every(i => i.alt && i.complete && i.naturalWidth)")


def test_the_slider_moves_by_pointer_and_by_key(page):
    pair = page.locator(".card .pair").first
    pair.scroll_into_view_if_needed()
    box = pair.bounding_box()
    page.mouse.click(box["x"] + 0.8 * box["width"], box["y"] + box["height"] / 2)
    cut = "node => parseFloat(getComputedStyle(node).getPropertyValue('--cut'))"
    at = pair.evaluate(cut)
    assert 70 < at < 90
    # Left of the cut is the base, a dark grey, and right of it the trained side, a light grey.
    shot = Image.open(io.BytesIO(pair.screenshot())).convert("L")
    greys = [shot.getpixel((int(x * shot.width), shot.height // 2)) for x in (0.1, 0.65, 0.95)]
    assert greys == [40, 40, 200]
    page.keyboard.press("ArrowLeft")
    assert pair.evaluate(cut) == at - 1


def test_the_sides_of_the_cards_can_be_chosen(page):
    page.select_option("#left", label="guided")
    pair = page.locator(".card .pair").first
    assert pair.locator(".side.left").inner_text() == "guided"
    assert pair.locator(".side.right").inner_text() == "trained"


def test_cards_are_sorted_by_gain_and_filtered_by_tag(page):
    assert len(shown(page)) == 24
    assert page.locator("#count").inner_text() == "24 of 30 prompts"
    page.select_option("#sort", "gain")
    assert shown(page)[0] == "a circle"
    page.select_option("#sort", "loss")
    assert shown(page)[0] == "two squares"
    page.select_option("#tag", "one")
    assert shown(page) == ["a dog", "a circle"]
    page.select_option("#tag", "")
    page.click("#more")
    assert len(shown(page)) == 30


def test_a_curve_shows_its_values_under_the_pointer_and_by_key(page):
    curve = page.locator(".curve").filter(has_text="reward/combined")
    svg = curve.locator("svg")
    svg.scroll_into_view_if_needed()
    box = svg.bounding_box()
    page.mouse.move(box["x"] + 0.95 * box["width"], box["y"] + box["height"] / 2)
    assert curve.locator(".tip").inner_text() == "step 2, 16 images: 0.2"
    page.mouse.move(0, 0)
    assert not curve.locator(".tip").is_visible()
    svg.focus()
    page.keyboard.press("ArrowLeft")
    assert curve.locator(".tip").inner_text() == "step 1, 8 images: 0.1"


def test_without_a_script_and_on_paper_the_pictures_stand_side_by_side(browser, file):
    sides = "[...document.querySelector('.pair').querySelectorAll('.side')]"
    visible = f"{sides}.map(side => side.getBoundingClientRect().x)"
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(file.as_uri())
    assert len(page.locator(".card:visible").all()) == 30
    assert not page.locator(".tools").is_visible()
    lefts = page.evaluate(visible)
    assert lefts == sorted(set(lefts))
    context.close()
    page = browser.new_page(color_scheme="dark")
    page.goto(file.as_uri())
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(21, 23, 26)"
    page.emulate_media(media="print")
    lefts = page.evaluate(visible)
    assert lefts == sorted(set(lefts))
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    page.close()
