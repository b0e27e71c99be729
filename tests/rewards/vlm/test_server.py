"""Judges behind a server of chat completions on loopback, which answers well or badly."""

import base64
import io
import json
import math
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import Any

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from flowalign.errors import RunError, UserError
from flowalign.rewards.adapters import make_reward
from flowalign.rewards.registry import load_rewards
from flowalign.rewards.vlm.server import ServerRewardDance, ServerRubric, ServerVqaScore

Reply = tuple[int, str]
"""Status and body; status 0 closes the connection without an answer."""


@dataclass
class Server:
    """The address, and the headers and bodies of all requests so far."""

    url: str
    requests: list[tuple[dict[str, str], dict[str, Any]]] = field(default_factory=list)

    def settings(self, **changes: Any) -> dict[str, Any]:
        return {"url": self.url, "model": "judge", "retries": 1, **changes}


@contextmanager
def serving(reply: Callable[[dict[str, Any], int], Reply]) -> Iterator[Server]:
    """A server that answers `reply(body, number of earlier requests)`."""
    lock = Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                count = len(server.requests)
                server.requests.append((dict(self.headers), body))
            status, text = (
                reply(body, count)
                if self.path == "/v1/chat/completions"
                else (404, f"no {self.path}")
            )
            if status:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None: ...

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{http.server_port}/v1")
    thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def completion(text: Any = "Yes", top: dict[str, float] | None = None) -> str:
    """A chat completion, with log-probabilities of its first token if `top` is given."""
    tokens = [{"token": token, "logprob": value} for token, value in (top or {}).items()]
    logprobs = (
        {"content": [{"token": text, "logprob": -0.1, "top_logprobs": tokens}]} if top else None
    )
    return json.dumps(
        {"choices": [{"message": {"role": "assistant", "content": text}, "logprobs": logprobs}]}
    )


def text_of(body: dict[str, Any]) -> str:
    return " ".join(
        part["text"] for part in body["messages"][0]["content"] if part["type"] == "text"
    )


def pictures_of(body: dict[str, Any]) -> list[Image.Image]:
    parts = [
        part["image_url"]["url"]
        for part in body["messages"][0]["content"]
        if part["type"] == "image_url"
    ]
    assert all(url.startswith("data:image/png;base64,") for url in parts)
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in parts]


def pictures(count: int) -> list[Image.Image]:
    pixels = torch.rand(count, 8, 12, 3, generator=torch.Generator().manual_seed(1)) * 255
    return [Image.fromarray(picture.byte().numpy()) for picture in pixels]


def ask(reward: Any, count: int = 1, metadata: list[dict[str, Any]] | None = None) -> torch.Tensor:
    return reward(pictures(count), [f"number {i}" for i in range(count)], metadata or [{}] * count)


YES = 200, completion(top={"Yes": -0.5, " yes": -2.5, "No": -1.5, "Maybe": -0.7})


def test_scores_are_in_the_order_of_the_images():
    def reply(body: dict[str, Any], count: int) -> Reply:
        number = int(re.search(r"number (\d+)", text_of(body)).group(1))
        time.sleep(0.02 * (7 - number))
        return 200, completion(top={"Yes": -0.1 * number, "No": -1.0})

    with serving(reply) as server:
        scores = ask(ServerVqaScore(**server.settings(concurrency=4)), 8)
    assert_close(scores, torch.sigmoid(1 - 0.1 * torch.arange(8)))


def test_a_question_holds_the_exact_image_and_requests_20_log_probabilities():
    with serving(lambda body, count: YES) as server:
        scores = ask(ServerVqaScore(**server.settings()))
    yes = math.exp(-0.5) + math.exp(-2.5)
    assert_close(scores, torch.tensor([yes / (yes + math.exp(-1.5))]))
    [(_, body)] = server.requests
    assert pictures_of(body)[0].tobytes() == pictures(1)[0].tobytes()
    assert text_of(body) == 'Does this figure show "number 0"? Please answer Yes or No.'
    sent = {key: body[key] for key in ("model", "max_tokens", "logprobs", "top_logprobs")}
    assert sent == {"model": "judge", "max_tokens": 1, "logprobs": True, "top_logprobs": 20}


def test_an_answer_without_yes_or_no_among_the_likeliest_is_not_scored():
    def reply(body: dict[str, Any], count: int) -> Reply:
        return (
            YES if "number 1" in text_of(body) else (200, completion(top={"The": -0.1, "I": -3.0}))
        )

    with serving(reply) as server:
        assert ask(ServerVqaScore(**server.settings()), 3).isnan().tolist() == [True, False, True]


def test_the_reference_is_sent_second_if_there_is_one(tmp_path):
    reference = pictures(2)[1]
    reference.save(tmp_path / "reference.png")
    with serving(lambda body, count: YES) as server:
        dance = ServerRewardDance(**server.settings())
        scores = ask(
            dance, 2, [{"ref_image": None}, {"ref_image": str(tmp_path / "reference.png")}]
        )
        with pytest.raises(
            RunError, match=r"rewards.reward_dance_server: .* has no field 'ref_image'"
        ):
            ask(dance)
    assert scores.isnan().tolist() == [True, False]
    [(_, body)] = server.requests
    assert [picture.tobytes() for picture in pictures_of(body)] == [
        pictures(2)[1].tobytes(),
        reference.tobytes(),
    ]
    assert text_of(body).startswith(
        'Image 1: Image 2: Both images were made for the prompt "number 1"'
    )


def test_a_written_score_is_divided_by_five_and_an_unreadable_one_not_scored():
    written = ["Final Score: 4", None, "I cannot judge.", "Final Score: 11"]

    def reply(body: dict[str, Any], count: int) -> Reply:
        assert (body["temperature"], body["max_tokens"]) == (0, 64)
        return 200, completion(written[int(re.search(r"number (\d)", text_of(body)).group(1))])

    with serving(reply) as server:
        scores = ask(ServerRubric(**server.settings(max_new_tokens=64)), 4)
    assert scores[0].item() == pytest.approx(0.8)
    assert scores[1:].isnan().all()


@pytest.mark.parametrize("status", [0, 408, 429, 500, 503])
def test_a_transient_failure_is_retried(status):
    with serving(lambda body, count: (status, "busy") if count == 0 else YES) as server:
        assert not ask(ServerVqaScore(**server.settings())).isnan().any()
    assert len(server.requests) == 2


@pytest.mark.parametrize(("status", "times"), [(400, 1), (401, 1), (500, 2)])
def test_a_permanent_failure_names_the_address_and_the_answer(status, times):
    with serving(lambda body, count: (status, "out of memory")) as server:
        with pytest.raises(
            RunError, match=rf"{server.url}/chat/completions answered {status}: out of memory"
        ):
            ask(ServerVqaScore(**server.settings()))
        assert len(server.requests) == times


@pytest.mark.parametrize(
    "body",
    [
        "<html>",
        "",
        "[]",
        '"yes"',
        "{}",
        '{"choices": []}',
        '{"choices": ["Yes"]}',
        '{"choices": [{"logprobs": {"content": [1]}}]}',
    ],
)
def test_a_malformed_answer_is_shown(body):
    with serving(lambda _, count: (200, body)) as server:
        message = "answered something other than a chat completion: " + re.escape(body)
        with pytest.raises(RunError, match=message):
            ask(ServerVqaScore(**server.settings()))
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "content", [[{"type": "text", "text": "Final Score: 4"}], {"score": 4}, 4], ids=repr
)
def test_an_answer_that_is_not_text_is_an_error(content):
    with serving(lambda body, count: (200, completion(content))) as server:
        with pytest.raises(RunError, match="answered something other than a chat completion"):
            ask(ServerRubric(**server.settings()))


def test_a_log_probability_of_nan_ends_the_scoring():
    with serving(
        lambda body, count: (200, completion(top={"Yes": math.nan, "No": -1.0}))
    ) as server:
        reward = make_reward("vqa", ServerVqaScore(**server.settings()))
        with pytest.raises(
            RunError,
            match=r"rewards\.vqa raised ValueError: the judge gave a log-probability of NaN",
        ):
            reward(torch.rand(1, 3, 8, 8), ["a circle"], [{}])


def test_missing_log_probabilities_are_an_error_with_an_alternative():
    with serving(lambda body, count: (200, completion("Yes"))) as server:
        with pytest.raises(RunError, match=r"gave no log-probabilities\. Use .* rubric_server"):
            ask(ServerVqaScore(**server.settings()))


def test_a_late_answer_is_neither_awaited_nor_requested_again():
    answered = Event()

    def reply(body: dict[str, Any], count: int) -> Reply:
        answered.wait()
        return 0, ""

    with serving(reply) as server:
        with pytest.raises(
            RunError, match=rf"{server.url}/chat/completions did not answer: .*timed? ?out"
        ):
            ask(ServerVqaScore(**server.settings(seconds=0.3, retries=3)))
        answered.set()
    assert len(server.requests) < 2


def test_an_absent_server_is_named():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
    with pytest.raises(
        RunError, match=rf"rewards.rubric_server: {url}/chat/completions did not answer"
    ):
        ask(ServerRubric(url=url, model="judge", retries=1))


def test_the_token_comes_from_the_environment_only(monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login someone password secret")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("MY_TOKEN", "abc")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(lambda body, count: YES) as server:
        ask(ServerVqaScore(**server.settings()))
        ask(ServerVqaScore(**server.settings(token_variable="MY_TOKEN")))
        monkeypatch.setenv("OPENAI_API_KEY", "def")
        ask(ServerVqaScore(**server.settings()))
    assert [headers.get("Authorization") for headers, _ in server.requests] == [
        None,
        "Bearer abc",
        "Bearer def",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "127.0.0.1:8000"}, r"url is '127.0.0.1:8000'. Write an address"),
        ({"concurrency": 0}, r"concurrency to 1 or more"),
        ({"seconds": 0}, r"Set seconds above 0"),
        ({"question": "Good?"}, r"question is 'Good\?', which .* Write \{prompt\}"),
    ],
)
def test_settings_that_cannot_work_are_an_error(settings, message):
    with pytest.raises(UserError, match=rf"rewards.vqa_score_server.*{message}"):
        ServerVqaScore(**{"url": "http://127.0.0.1:1/v1", "model": "judge", **settings})


def test_a_run_can_use_a_judge_on_a_server_with_tensors():
    spec = "flowalign.rewards.vlm.server:ServerVqaScore"
    with pytest.raises(UserError, match=r"\.url is missing"):
        load_rewards({spec: {"model": "judge"}})
    with serving(lambda body, count: YES if count == 0 else (500, "gone")) as server:
        [reward] = load_rewards({spec: server.settings(retries=0)})
        assert reward(torch.rand(1, 3, 8, 8), ["a circle"], [{}]).shape == (1,)
        with pytest.raises(RunError, match="answered 500: gone"):
            reward(torch.rand(1, 3, 8, 8), ["a circle"], [{}])
