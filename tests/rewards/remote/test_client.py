"""A reward behind HTTP scores as in this process, and errors of a server name its address."""

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
from torch import Tensor
from torch.testing import assert_close

from flowalign.errors import RunError, UserError
from flowalign.rewards.adapters import make_reward
from flowalign.rewards.base import Reward, traits
from flowalign.rewards.inspection import bundled_samples
from flowalign.rewards.registry import load_reward
from flowalign.rewards.remote import client as client_module
from flowalign.rewards.remote.client import RemoteReward, token_in
from flowalign.rewards.remote.connections import make_server
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
    server = make_server(make_app(reward, token, max_bytes))
    thread = Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield address
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def remote(url: str, **settings: Any) -> Reward:
    return make_reward("far", RemoteReward(url, **settings))


def score(reward: Reward, images: Tensor = IMAGES) -> Tensor:
    return reward(images, PROMPTS[: len(images)], [{"index": i} for i in range(len(images))])


@pytest.mark.parametrize("name", ["brightness", "clip_score", "scene_match_graded"])
def test_remote_scores_equal_local_ones_bit_for_bit(name):
    samples, here = bundled_samples(), load_reward(name)
    with served(here) as url:
        far = load_reward(url)
        assert torch.equal(far(*samples.inputs), here(*samples.inputs))
    assert far.traits.range == here.traits.range
    assert far.name == url.removeprefix("http://")


@pytest.mark.parametrize("concurrency", [1, 4])
def test_scores_are_in_the_order_of_the_images(concurrency):
    def places(images, prompts, metadata):
        assert prompts == [PROMPTS[entry["index"]] for entry in metadata]
        return [entry["index"] for entry in metadata]

    with served(make_reward("places", places)) as url:
        assert score(remote(url, batch=2, concurrency=concurrency)).tolist() == list(range(7))


def test_missing_scores_stay_missing():
    with served(
        make_reward(
            "odd", lambda images, prompts, metadata: [None if len(p) == 3 else 1.0 for p in prompts]
        )
    ) as url:
        assert score(remote(url)).isnan().tolist() == [len(prompt) == 3 for prompt in PROMPTS]


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
        far = remote(url, batch=1)
        assert far.of_groups
        assert torch.equal(score(far), score(here))


HEALTH = 200, '{"level": "pointwise", "range": [null, null]}'
Reply = tuple[int, str] | tuple[int, str, dict[str, str]]
Answer = Reply | Iterator[bytes] | Event | None
"""A status, a text and headers; all bytes in pieces; nothing before an event; or an abrupt end."""


@contextmanager
def answering(answer: Callable[[dict[str, Any]], Answer], health: Reply = HEALTH) -> Iterator[str]:
    """The address of a server with these answers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.say(*health)

        def do_POST(self) -> None:
            reply = answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            if isinstance(reply, tuple):
                self.say(*reply)
            elif isinstance(reply, Event):
                reply.wait(300)
            elif reply:
                with suppress(OSError):
                    self.wfile.writelines(reply)

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
        ((200, "<html>"), "answered something other than a list of finite numbers and null"),
        ((200, "[1]"), "answered something other than a list"),
        ((200, '{"points": []}'), "answered something other than a list"),
        ((200, '{"scores": ["high"]}'), "answered something other than a list"),
        ((200, '{"scores": [0, 1]}'), "answered 2 scores for 7 images. It must return one"),
        (
            (200, '{"scores": [NaN, 0, 1, 2, 3, 4, 5]}'),
            "(nan is not a finite number)",
        ),
        ((200, '{"scores": [Infinity, 0, 1, 2, 3, 4, 5]}'), "(inf is not a finite number)"),
        (
            (422, '{"detail": "rewards.it raised ValueError"}'),
            'answered 422: {"detail": "rewards.it raised ValueError"}',
        ),
    ],
)
def test_a_wrong_answer_is_an_error_with_the_address_and_not_repeated(answer, message):
    answers: list[Answer] = [answer]
    with answering(lambda body: answers.pop()) as url, pytest.raises(RunError) as caught:
        score(load_reward(url))
    assert message in str(caught.value)
    assert url.removeprefix("http://") in str(caught.value)


def test_scores_outside_the_range_of_the_server_are_an_error():
    with answering(lambda body: FINE, (200, '{"level": "pointwise", "range": [0, 1]}')) as url:
        with pytest.raises(
            RunError, match=r"127\.0\.0\.1.* returned 3, outside its declared range \[0, 1\]"
        ):
            score(load_reward(url))


@pytest.mark.parametrize("first", [(503, "busy"), (429, "later"), None], ids=repr)
def test_a_transient_failure_is_retried(first):
    answers: list[Answer] = [first, FINE]
    with answering(lambda body: answers.pop(0)) as url:
        assert_close(
            score(remote(url, retries=1)),
            torch.tensor([0, 1, math.nan, 3, 4, 5, 6]),
            equal_nan=True,
        )
        answers.append((503, "busy"))
        with pytest.raises(RunError, match=rf"{url}/v1/score answered 503: busy"):
            score(remote(url, retries=0))


def test_a_late_answer_is_not_awaited():
    late, bodies = Event(), []
    with answering(lambda body: bodies.append(body) or late) as url:
        reward = RemoteReward(url)
        reward.seconds = 0.1
        with pytest.raises(
            RunError, match=rf"{url}/v1/score did not answer: .*timed out after 0\.1"
        ):
            score(make_reward("late", reward))
        late.set()
    assert len(bodies) < 2


def test_a_retry_does_not_wait_as_long_as_the_server_says():
    answers: list[Answer] = [(503, "busy", {"retry-after": "3600"}), FINE]
    with answering(lambda body: answers.pop(0)) as url:
        assert score(remote(url, retries=1))[1] == 1


HEADERS = b"HTTP/1.0 200 OK\r\n"


@pytest.mark.parametrize(
    "start", [b"", HEADERS + b"slow: ", HEADERS + b"\r\n"], ids=["status", "headers", "body"]
)
def test_an_answer_in_drips_ends_at_the_deadline(start):
    over = Event()

    def drips() -> Iterator[bytes]:
        yield start
        # Bounded, so that a client without a deadline fails this test rather than never ends it.
        for _ in range(1000):
            if not over.wait(0.01):
                yield b"H"

    with answering(lambda body: drips()) as url:
        reward = RemoteReward(url)
        reward.seconds = 0.2
        message = rf"{url}/v1/score did not answer: .*timed out after 0\.2 seconds"
        try:
            with pytest.raises(RunError, match=message):
                score(make_reward("drips", reward))
        finally:
            over.set()


@pytest.mark.parametrize("status", [301, 303, 307, 308])
def test_redirects_are_refused_by_name_and_carry_no_images(status):
    bodies: list[dict[str, Any]] = []
    with answering(lambda body: bodies.append(body) or FINE) as other:
        redirect = {"location": f"{other}/v1/score"}
        with answering(lambda body: (status, "", redirect)) as url:
            message = rf"{url}/v1/score answered {status} and redirects to '{other}/v1/score'"
            with pytest.raises(RunError, match=message):
                score(remote(url))
    assert not bodies


def test_a_redirect_of_the_first_request_is_refused_by_name():
    with answering(lambda body: FINE) as other:
        redirect = {"location": f"{other}/health"}
        with answering(lambda body: FINE, (302, "", redirect)) as url:
            with pytest.raises(UserError, match=f"redirects to '{other}/health'") as caught:
                remote(url)
    assert "Start one" not in str(caught.value)


def test_a_server_that_stays_busy_is_not_awaited_forever(monkeypatch):
    monkeypatch.setattr(client_module, "BUSY_SECONDS", 0.0)
    busy = 503, "busy", {client_module.BUSY: "yes"}
    with answering(lambda body: busy) as url:
        with pytest.raises(RunError, match=rf"{url}/v1/score answered 503: busy"):
            score(remote(url))


def test_an_endless_answer_is_cut_off(monkeypatch):
    monkeypatch.setattr(client_module, "MAX_BYTES", 1000)
    with answering(lambda body: (200, " " * 2000)) as url:
        message = rf"{url}/v1/score sent more than 1000 bytes"
        with pytest.raises(RunError, match=message):
            score(remote(url))


def test_metadata_that_json_cannot_hold_is_an_error():
    with (
        answering(lambda body: FINE) as url,
        pytest.raises(RunError, match=r"cannot be called: a prompt's metadata cannot be written"),
    ):
        remote(url)(IMAGES[:1], ["one"], [{"level": math.nan}])


def test_an_absent_server_is_named():
    with answering(lambda body: FINE) as url:
        reward = remote(url, retries=1)
    with pytest.raises(RunError, match=rf"{url}/v1/score did not answer: .*refused"):
        score(reward)
    with pytest.raises(
        UserError,
        match=rf"{url}/health did not answer: .*refused[\s\S]*Start one there: flowalign",
    ):
        remote(url)


@pytest.mark.parametrize(
    "health",
    [
        (200, "<html>"),
        (404, "nothing"),
        (200, '{"level": "sometimes", "range": [0, 1]}'),
        (200, '{"level": "group", "range": 3}'),
    ],
)
def test_another_kind_of_server_is_named(health):
    with answering(lambda body: FINE, health) as url, pytest.raises(UserError, match=url):
        remote(url)


def test_a_token_that_cannot_be_sent_is_an_error_that_does_not_show_it(monkeypatch):
    monkeypatch.setenv("MINE", "geheim\nwort")
    with pytest.raises(UserError) as caught:
        RemoteReward("http://127.0.0.1:1", token_variable="MINE")
    assert "variable MINE has characters that cannot be sent" in str(caught.value)
    assert "geheim" not in str(caught.value)
    monkeypatch.setenv("MINE", " geheim\n")
    assert token_in("MINE") == "geheim"


@pytest.mark.parametrize(
    "settings",
    [{"batch": 0}, {"seconds": 0}, {"concurrency": 0}, {"retries": -1}, {"url": "ftp://x"}],
)
def test_settings_that_cannot_work_are_an_error(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        RemoteReward(**{"url": "http://127.0.0.1:1", **settings})
