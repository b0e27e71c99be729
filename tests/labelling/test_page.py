"""The voting page in headless Chromium, at the width of a desk and of a phone."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image

from benchmarks.votes import CONFIG, train, vote
from flowalign.data.votes import read_votes
from flowalign.labelling.label import LabelSettings, open_session
from flowalign.labelling.server import make_app
from flowalign.labelling.session import Session
from flowalign.rewards.registry import load_reward
from flowalign.rewards.remote.connections import make_server
from flowalign.rewards.remote.server import listen
from scripts.make_votes import choice_of, pixels
from tests.browser import browser

__all__ = ["browser"]
RISES = {
    "taste, crd": ("scene_match", "scene_match_graded"),
    **dict.fromkeys(
        ("taste, kto", "taste, dpo", "taste, d3po"), ("scene_match_graded", "chosen_preferred")
    ),
    "kto": ("chosen_preferred",),
}
"""What clearly rises after 60 answers of a voter who goes by the graded score."""
LONG = "<b>a prompt</b> " + "with a long word supercalifragilistic " * 5


@pytest.fixture
def folder(tmp_path) -> Path:
    """Pictures of one prompt, from dark to bright red."""
    lines = []
    for level in range(5):
        Image.new("RGB", (64, 64), (50 * level, 0, 0)).save(tmp_path / f"{level}.png")
        lines.append(json.dumps({"file_name": f"{level}.png", "prompt": LONG}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path


@contextmanager
def served(session: Session) -> Iterator[str]:
    """The address of the page of a session."""
    with listen("127.0.0.1", 0) as incoming:
        server = make_server(make_app(session, "token", "anna"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [incoming]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{incoming.getsockname()[1]}/token/"
        finally:
            server.should_exit = True
            thread.join()
            session.close()


@contextmanager
def opened(browser, address: str, width: int):
    """The page, which must load nothing else and report no error."""
    page = browser.new_page(viewport={"width": width, "height": 800})
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "request",
        lambda request: request.url.startswith(address) or problems.append(request.url),
    )
    page.goto(address)
    yield page
    # The browser asks for an icon on its own.
    assert [text for text in problems if "favicon" not in text and "404" not in text] == []
    page.close()


def shown(page, number: int) -> None:
    """Wait until the voter's question of this number, from 1, is there with its pictures."""
    page.locator("#status", has_text=f"{number} of ").wait_for()
    page.locator(f"#pictures[data-ready='{number - 1}']").wait_for()


@pytest.mark.parametrize("width", [1400, 390])
def test_pairs_are_voted_on_by_key_and_by_pointer(folder, browser, width):
    session = open_session(str(folder), LabelSettings(questions=5))
    with served(session) as address, opened(browser, address, width) as page:
        page.locator("#pictures img").nth(1).wait_for()
        shown(page, 1)
        assert page.inner_text("#prompt").startswith("<b>a prompt</b>")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for key, place in (("ArrowLeft", 2), ("2", 3), ("ArrowUp", 4)):
            page.keyboard.press(key)
            shown(page, place)
        page.keyboard.press("z")
        shown(page, 3)
        page.click("#pictures button:nth-child(2)")
        shown(page, 4)
        page.click("text=Both bad")
        shown(page, 5)
        page.keyboard.press(" ")
        page.locator("#status", has_text="done").wait_for()
    labels = [vote.labels for vote in read_votes(folder / "votes.jsonl", "").votes]
    assert labels == [(1, -1), (-1, 1), (-1, 1), (-1, -1), None]


def test_a_group_has_a_best_and_a_worst_picture(folder, browser):
    session = open_session(str(folder), LabelSettings(mode="group", pictures=3, questions=1))
    with served(session) as address, opened(browser, address, 390) as page:
        page.locator("#pictures img").nth(2).wait_for()
        shown(page, 1)
        page.keyboard.press("3")
        page.locator("#note", has_text="worst").wait_for()
        page.keyboard.press("1")
        page.locator("#status", has_text="done").wait_for()
    (vote,) = read_votes(folder / "votes.jsonl", "").votes
    assert vote.labels == (-1, 0, 1)


def test_a_second_voter_begins_at_the_first_question(folder, browser):
    session = open_session(str(folder), LabelSettings(mode="thumbs", questions=5))
    with served(session) as address, opened(browser, address, 1400) as page:
        page.locator("#pictures img").nth(0).wait_for()
        shown(page, 1)
        page.keyboard.press("ArrowRight")
        shown(page, 2)
        page.fill("#voter", "ben")
        page.keyboard.press("Enter")
        shown(page, 1)
        page.keyboard.press("ArrowLeft")
        shown(page, 2)
    votes = read_votes(folder / "votes.jsonl", "").votes
    assert [(vote.voter, vote.labels) for vote in votes] == [("anna", (1,)), ("ben", (-1,))]


def vote_by_sight(page, seed: int) -> None:
    """Prefer the picture that shows more of its prompt, by the keys, and err once in ten votes."""
    checker, random = load_reward("scene_match_graded"), Random(seed)
    keys = {"left": "ArrowLeft", "right": "ArrowRight", "tie": "ArrowUp", "both_bad": "ArrowDown"}
    shown(page, 1)
    # More than the questions, because some are asked again.
    total = int(page.inner_text("#status").partition(" of ")[2].split()[0])
    for place in range(1, total + 1):
        shown(page, place)
        sources = page.eval_on_selector_all("#pictures img", "all => all.map(one => one.src)")
        seen = torch.stack([pixels(page.request.get(source).body()) for source in sources])
        prompts = [page.inner_text("#prompt")] * len(seen)
        scores = checker(seen, prompts, [{}] * len(seen))
        page.keyboard.press(keys[choice_of(scores.tolist(), random)])
    page.locator("#status", has_text="done").wait_for()


@pytest.mark.slow
def test_votes_in_the_browser_train_a_model_that_draws_what_was_asked(tmp_path, browser):
    votes = tmp_path / "votes.jsonl"
    session = open_session(CONFIG, LabelSettings(questions=60, votes=str(votes)))
    with served(session) as address, opened(browser, address, 1400) as page:
        vote_by_sight(page, seed=0)
    held_out = vote(CONFIG, tmp_path / "held-out", questions=300, seed=1)
    for row, figures in RISES.items():
        train(row, votes, held_out, tmp_path / row)
        rises = json.loads((tmp_path / row / "summary.json").read_text())["difference"]
        for figure in figures:
            low, _mean, _high = rises[figure]
            assert low > 0, (row, figure)
