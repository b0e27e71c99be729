"""What the server of a reward refuses, and runs whose server goes away."""

import base64
import json
import zlib
from collections.abc import Callable, Iterator
from queue import Queue
from threading import Event, Thread
from typing import Any

import pytest
import requests
import torch
import uvicorn

from flowalign.checkpoint import checkpoints
from flowalign.cli import main
from flowalign.errors import RunError, UserError
from flowalign.rewards.adapt import make_reward, to_pil
from flowalign.rewards.pictures import brightness
from flowalign.rewards.web import to_base64
from flowalign.serving import picture, serve
from flowalign.tracking import read_metrics
from tests.rewards.test_web import Answer, answering, IMAGES, score, served, web
from tests.tiny import ROOT, SMALL, TINY

BRIGHTNESS = make_reward("brightness", brightness)
PNG = to_base64(to_pil(IMAGES[:1])[0])


def asked(*images: str) -> dict[str, Any]:
    return {"images": images, "prompts": ["one"] * len(images), "metadata": [{}] * len(images)}


def test_the_token_is_asked_for(monkeypatch):
    monkeypatch.setenv("MINE", "secret")
    with served(BRIGHTNESS, token="secret") as url:
        assert torch.equal(score(web(url, token_variable="MINE")), score(BRIGHTNESS))
        for given in ("", "guessed"):
            monkeypatch.setenv("MINE", given)
            with pytest.raises(UserError, match=rf"{url}/health answered 401: .*the token is missing or wrong"):
                web(url, token_variable="MINE")
            headers = {"authorization": f"Bearer {given}"}
            assert requests.post(f"{url}/v1/score", json=asked(PNG), headers=headers, timeout=60).status_code == 401


def test_a_request_that_is_too_large_is_refused():
    with served(BRIGHTNESS, max_bytes=500) as url:
        far = web(url)
        with pytest.raises(RunError, match=rf"{url}/v1/score answered 413: .*the request has \d+ bytes; at most 500 are taken"):
            score(far)
        with pytest.raises(RunError, match=rf"{url}/v1/score answered 413"):
            score(far, torch.rand(4, 3, 512, 512))
        assert requests.post(f"{url}/v1/score", data=iter([b"{}"]), timeout=60).status_code == 411


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)


def png(width: int, height: int, *chunks: bytes) -> str:
    header = chunk(b"IHDR", width.to_bytes(4) + height.to_bytes(4) + bytes([8, 2, 0, 0, 0]))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks)).decode()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with served(BRIGHTNESS) as url:
        yield url


@pytest.mark.parametrize(
    ("image", "status"),
    [
        ("%%%", 422),
        ("AAAA", 422),
        ("", 422),
        (PNG[:60], 422),
        (png(8, 8, chunk(b"IDAT", b"no zlib")), 422),
        (png(8, 8, chunk(b"IDAT", zlib.compress(b"\0" * 9)), b"\0\0\0\1????"), 422),
        (png(5000, 5000, chunk(b"IDAT", b"")), 413),
        (png(50000, 50000, chunk(b"IDAT", b"")), 422),
    ],
)
def test_what_is_no_picture_is_refused(image, status, server):
    reply = requests.post(f"{server}/v1/score", json=asked(PNG, image), timeout=60)
    assert reply.status_code == status
    assert "an image" in reply.json()["detail"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (asked(PNG, to_base64(to_pil(torch.rand(1, 3, 4, 8))[0])), "of one size"),
        (asked(PNG) | {"prompts": []}, "as many prompts and metadata as images"),
        (asked(), "as many prompts and metadata as images"),
        ({"images": [PNG]}, "Field required"),
    ],
)
def test_what_cannot_be_scored_is_refused(body, message, server):
    reply = requests.post(f"{server}/v1/score", json=body, timeout=60)
    assert reply.status_code == 422
    assert message in reply.text


def test_what_a_reward_raises_there_is_answered_here_and_not_asked_for_again():
    calls = []

    def broken(images, prompts, metadata):
        calls.append(len(images))
        raise ValueError("no weights")

    with served(make_reward("broken", broken)) as url:
        with pytest.raises(RunError, match=rf"{url}/v1/score answered 422: .*rewards\.broken raised ValueError: no weights"):
            score(web(url))
    assert calls == [7]


class Learning:
    def __call__(self, images, prompts, metadata):
        return images.mean((1, 2, 3))

    def update(self, images):
        return {}

    def state(self):
        return {}

    def load_state(self, state):
        pass


def test_a_reward_that_learns_is_not_served():
    with pytest.raises(UserError, match="learning learns as training goes, and behind HTTP it would not"):
        serve(make_reward("learning", Learning()), "127.0.0.1", 8123, "FLOWALIGN_TOKEN", 1)


@pytest.mark.parametrize(("token", "said"), [("", "token not asked for (set FLOWALIGN_TOKEN)"), ("secret", "token asked for")])
def test_the_command_says_where_it_serves_and_how_to_use_it(token, said, monkeypatch, capsys):
    settings: dict[str, Any] = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **given: settings.update(given))
    monkeypatch.setenv("FLOWALIGN_TOKEN", token)
    assert main(["reward", "serve", "brightness", "--port", "8123"]) == 0
    assert (settings["host"], settings["port"]) == ("127.0.0.1", 8123)
    output = capsys.readouterr().out
    assert f"brightness at http://127.0.0.1:8123, {said}" in output
    assert 'rewards: {"http://127.0.0.1:8123": 1.0}' in output


# runs


@pytest.fixture
def command(tmp_path, monkeypatch) -> Callable[..., list[str]]:
    """A small run with the reward at an address."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "few.txt").write_text("a red circle")

    def train(url: str, retries: int) -> list[str]:
        rewards = [f'rewards={{"{url}": {{retries: {retries}}}}}', "evaluation.rewards={brightness: 1}"]
        few = [f"evaluation.prompts={tmp_path / 'few.txt'}", f"output={tmp_path / 'run'}", "train.save_every=1"]
        return ["train", str(TINY), *SMALL, *few, *rewards]

    return train


def until(gone: Event, good: int = 3) -> Callable[[dict[str, Any]], Answer]:
    """Scores brightness for a few requests, of which a run asks two before it starts and one a step, then breaks off."""
    left = [None] * good

    def answer(body: dict[str, Any]) -> Answer:
        if not left:
            gone.set()
            return None
        left.pop()
        return 200, json.dumps({"scores": [picture(image).float().mean().item() / 255 for image in body["images"]]})

    return answer


def test_a_run_whose_server_is_started_again_goes_on(command, tmp_path):
    gone, over, addresses = Event(), Event(), Queue()

    def keep() -> None:
        with answering(until(gone)) as url:
            addresses.put(url)
            gone.wait(300)
        with served(BRIGHTNESS, port=int(url.rpartition(":")[2])):
            over.wait(300)

    keeper = Thread(target=keep)
    keeper.start()
    try:
        url = addresses.get(timeout=60)
        assert main(command(url, retries=8)) == 0
        assert gone.is_set()
    finally:
        gone.set()
        over.set()
        keeper.join()
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(0 < line[f"reward/{url.removeprefix('http://')}"] < 1 for line in lines)


def test_a_run_whose_server_stays_away_stops_and_goes_on_once_it_is_back(command, tmp_path, capsys):
    with answering(until(Event())) as url:
        assert main(command(url, retries=1)) == 1
    error = capsys.readouterr().err
    assert f"{url}/v1/score did not answer" in error
    assert f"The steps done are in {checkpoints(tmp_path / 'run')[-1]}; the same command goes on from there." in error
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1]
    assert main(command(url, retries=1)) == 2
    assert f"{url}/health did not answer" in capsys.readouterr().err
    with served(BRIGHTNESS, port=int(url.rpartition(":")[2])):
        assert main(command(url, retries=1)) == 0
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2]
