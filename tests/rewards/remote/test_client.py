"""A reward behind HTTP scores as it does here, and what a server does wrong is answered with its address."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import create_server
from threading import Event, Thread
from typing import Any

import pytest
import torch
import uvicorn
from torch import Tensor
from torch.testing import assert_close

from flowalign.errors import RunError, UserError
from flowalign.rewards.adapters import make_reward
from flowalign.rewards.base import Reward, traits
from flowalign.rewards.inspection import bundled_samples
from flowalign.rewards.registry import load_reward
from flowalign.rewards.remote import client as web_module
from flowalign.rewards.remote.client import token_in, RemoteReward
from flowalign.rewards.remote.server import make_app

IMAGES = torch.tensor([10, 250, 90, 30, 170, 60, 200])[:, None, None, None].expand(7, 3, 8, 8) / 255
PROMPTS = ["one", "two", "three", "four", "five", "six", "seven"]


@contextmanager
def served(
    reward: Reward, token: str | None = None, max_bytes: int = 2**24, port: int = 0
) -> Iterator[str]:
    """The address of the reward behind a real server."""
    listening = create_server(("127.0.0.1", port))
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(make_app(reward, token, max_bytes), log_config=None))
    thread = Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield address
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def web(url: str, **settings: Any) -> Reward:
    return make_reward("far", RemoteReward(url, **settings))


def score(reward: Reward, images: Tensor = IMAGES) -> Tensor:
    return reward(images, PROMPTS[: len(images)], [{"place": i} for i in range(len(images))])


# the same as here


@pytest.mark.parametrize("name", ["brightness", "clip_score", "scene_match_graded"])
def test_scores_from_afar_are_those_from_here_bit_for_bit(name):
    samples, here = bundled_samples(), load_reward(name)
    with served(here) as url:
        far = load_reward(url)
        assert torch.equal(far(*samples.inputs), here(*samples.inputs))
    assert far.traits.range == here.traits.range
    assert far.name == url.removeprefix("http://")


@pytest.mark.parametrize("concurrency", [1, 4])
def test_scores_are_in_the_order_of_the_images(concurrency):
    def places(images, prompts, metadata):
        assert prompts == [PROMPTS[entry["place"]] for entry in metadata]
        return [entry["place"] for entry in metadata]

    with served(make_reward("places", places)) as url:
        assert score(web(url, batch=2, concurrency=concurrency)).tolist() == list(range(7))


def test_what_is_not_scored_there_is_not_scored_here():
    with served(
        make_reward(
            "odd", lambda images, prompts, metadata: [None if len(p) == 3 else 1.0 for p in prompts]
        )
    ) as url:
        assert score(web(url)).isnan().tolist() == [len(prompt) == 3 for prompt in PROMPTS]


@pytest.mark.parametrize("level", ["group", "pairwise"])
def test_rewards_of_groups_get_whole_groups(level):
    @traits(level="group")
    def group(images, prompts, metadata):
        return images.mean((1, 2, 3)) / images.mean((1, 2, 3)).sum()

    @traits(level="pairwise")
    def pairwise(first, second, prompts, metadata):
        return (0.5 + first.mean((1, 2, 3)) - second.mean((1, 2, 3))).clamp(0, 1)

    here = make_reward(level, {"group": group, "pairwise": pairwise}[level])
    with served(here) as url:
        far = web(url, batch=1)
        assert far.of_groups
        assert torch.equal(score(far), score(here))


# what a server does wrong

HEALTH = 200, '{"level": "pointwise", "range": [null, null]}'
Answer = tuple[int, str] | tuple[int, str, dict[str, str]] | Iterator[bytes] | Event | None
"""A status, a text and headers; piece by piece; too late, until the event; or breaking off."""


@contextmanager
def answering(
    answer: Callable[[dict[str, Any]], Answer], health: tuple[int, str] = HEALTH
) -> Iterator[str]:
    """The address of a server that answers so."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.say(*health)

        def do_POST(self) -> None:
            found = answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            if isinstance(found, tuple):
                self.say(*found)
            elif isinstance(found, Event):
                found.wait(300)
            elif found:
                self.send_response(200)
                self.end_headers()
                with suppress(OSError):
                    self.wfile.writelines(found)

        def say(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"content-length": str(len(text)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


FINE = 200, json.dumps({"scores": [0.0, 1.0, None, 3.0, 4.0, 5.0, 6.0]})


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, "<html>"), "answered what is no list of scores: <html>"),
        ((200, "[1]"), "answered what is no list of scores"),
        ((200, '{"points": []}'), "answered what is no list of scores"),
        ((200, '{"scores": ["high"]}'), "answered what is no list of scores"),
        ((200, '{"scores": [0, 1]}'), "answered 2 scores; expected 7, one an image"),
        (
            (200, '{"scores": [NaN, 0, 1, 2, 3, 4, 5]}'),
            "answered nan; scores are finite, and null where there is none",
        ),
        ((200, '{"scores": [Infinity, 0, 1, 2, 3, 4, 5]}'), "answered inf; scores are finite"),
        (
            (422, '{"detail": "rewards.it raised ValueError"}'),
            'answered 422: {"detail": "rewards.it raised ValueError"}',
        ),
    ],
)
def test_a_wrong_answer_is_named_with_the_address_and_not_asked_for_again(answer, message):
    answers: list[Answer] = [answer]
    with answering(lambda body: answers.pop()) as url, pytest.raises(RunError) as caught:
        score(load_reward(url))
    assert message in str(caught.value)
    assert url.removeprefix("http://") in str(caught.value)


def test_scores_outside_the_range_that_the_server_says_are_an_error():
    with answering(lambda body: FINE, (200, '{"level": "pointwise", "range": [0, 1]}')) as url:
        with pytest.raises(
            RunError, match=r"127\.0\.0\.1.* returned 3, outside the range \[0, 1\]"
        ):
            score(load_reward(url))


@pytest.mark.parametrize("first", [(503, "busy"), (429, "later"), None], ids=repr)
def test_what_passes_is_asked_for_again(first):
    answers: list[Answer] = [first, FINE]
    with answering(lambda body: answers.pop(0)) as url:
        assert_close(
            score(web(url, retries=1)), torch.tensor([0, 1, math.nan, 3, 4, 5, 6]), equal_nan=True
        )
        answers.append((503, "busy"))
        with pytest.raises(RunError, match=rf"{url}/v1/score answered 503: busy"):
            score(web(url, retries=0))


def test_an_answer_that_is_too_late_is_not_waited_for():
    late, asked = Event(), []
    with answering(lambda body: asked.append(body) or late) as url:
        reward = RemoteReward(url)
        reward.seconds = 0.1
        with pytest.raises(RunError, match=rf"{url}/v1/score did not answer: .*Read timed out"):
            score(make_reward("late", reward))
        late.set()
    assert len(asked) == 1


def test_a_server_that_names_a_time_is_asked_when_we_like():
    answers: list[Answer] = [(503, "busy", {"retry-after": "3600"}), FINE]
    with answering(lambda body: answers.pop(0)) as url:
        assert score(web(url, retries=1))[1] == 1


def test_an_answer_that_drips_is_not_waited_for():
    over = Event()

    def drips() -> Iterator[bytes]:
        while not over.wait(0.02):
            yield b" "

    with answering(lambda body: drips()) as url:
        reward = RemoteReward(url)
        reward.seconds = 0.2
        with pytest.raises(
            RunError,
            match=rf"{url}/v1/score did not answer: \d+ bytes in 0\.2 seconds were not all of it",
        ):
            score(make_reward("drips", reward))
        over.set()


def test_an_answer_without_end_is_not_read_to_it(monkeypatch):
    monkeypatch.setattr(web_module, "LONGEST", 1000)
    with answering(lambda body: (200, " " * 2000)) as url:
        with pytest.raises(
            RunError,
            match=rf"{url}/v1/score did not answer: \d+ bytes in 60 seconds were not all of it",
        ):
            score(web(url))


def test_a_field_that_is_no_json_is_named_as_such():
    with (
        answering(lambda body: FINE) as url,
        pytest.raises(RunError, match=r"cannot be asked: a field of the prompts is no JSON"),
    ):
        web(url)(IMAGES[:1], ["one"], [{"level": math.nan}])


def test_a_server_that_is_gone_is_named():
    with answering(lambda body: FINE) as url:
        reward = web(url, retries=1)
    with pytest.raises(RunError, match=rf"{url}/v1/score did not answer: .*refused"):
        score(reward)
    with pytest.raises(
        UserError,
        match=rf"{url}/health did not answer: .*refused[\s\S]*Start one there: flowalign reward serve",
    ):
        web(url)


@pytest.mark.parametrize(
    "health",
    [
        (200, "<html>"),
        (404, "nothing"),
        (200, '{"level": "sometimes", "range": [0, 1]}'),
        (200, '{"level": "group", "range": 3}'),
    ],
)
def test_what_is_no_server_of_rewards_is_named(health):
    with answering(lambda body: FINE, health) as url, pytest.raises(UserError, match=url):
        web(url)


def test_a_token_that_cannot_be_sent_is_named_by_its_variable_alone(monkeypatch):
    monkeypatch.setenv("MINE", "geheim\nwort")
    with pytest.raises(UserError) as caught:
        RemoteReward("http://127.0.0.1:1", token_variable="MINE")
    assert "MINE holds what no token has" in str(caught.value)
    assert "geheim" not in str(caught.value)
    monkeypatch.setenv("MINE", " geheim\n")
    assert token_in("MINE") == "geheim"


@pytest.mark.parametrize(
    "settings",
    [{"batch": 0}, {"seconds": 0}, {"concurrency": 0}, {"retries": -1}, {"url": "ftp://x"}],
)
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        RemoteReward(**{"url": "http://127.0.0.1:1", **settings})
