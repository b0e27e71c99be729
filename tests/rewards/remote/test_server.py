"""Requests that the server of a reward rejects, and runs whose server disappears."""

import base64
import io
import json
import math
import select
import socket
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, ExitStack, suppress
from dataclasses import replace
from queue import Queue
from threading import enumerate as enumerate_threads
from threading import Event, Thread
from typing import Any

import pytest
import requests
import torch
import uvicorn
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from flowalign.cli import main
from flowalign.errors import RunError, UserError
from flowalign.reporting.trackers import read_metrics
from flowalign.rewards.adapters import make_reward, to_pil
from flowalign.rewards.base import Reward
from flowalign.rewards.pixel_statistics import brightness
from flowalign.rewards.remote import client as client_module
from flowalign.rewards.remote import connections
from flowalign.rewards.remote import server as server_module
from flowalign.rewards.remote.client import to_base64
from flowalign.rewards.remote.connections import make_server
from flowalign.rewards.remote.decoding import decode_images, decode_request
from flowalign.rewards.remote.server import make_app, serve
from flowalign.rewards.worker import THREAD
from flowalign.runs.checkpoint import checkpoints
from tests.processes import ENVIRONMENT
from tests.rewards.remote.test_client import Answer, answering, IMAGES, remote, score, served
from tests.runs.damage import same_adapter
from tests.tiny import ROOT, SMALL, TINY

BRIGHTNESS = make_reward("brightness", brightness)
PNG = to_base64(to_pil(IMAGES[:1])[0])


def request_body(*images: str) -> dict[str, Any]:
    return {"images": images, "prompts": ["one"] * len(images), "metadata": [{}] * len(images)}


def test_the_token_is_required(monkeypatch):
    monkeypatch.setenv("MINE", "secret")
    with served(BRIGHTNESS, token="secret") as url:
        assert torch.equal(score(remote(url, token_variable="MINE")), score(BRIGHTNESS))
        for sent in ("", "guessed"):
            monkeypatch.setenv("MINE", sent)
            with pytest.raises(
                UserError, match=rf"{url}/health answered 401: .*the token is missing or wrong"
            ):
                remote(url, token_variable="MINE")
            headers = {"authorization": f"Bearer {sent}"}
            for body in (json.dumps(request_body(PNG)), "no JSON"):
                score_url = f"{url}/v1/score"
                reply = requests.post(score_url, data=body, headers=headers, timeout=60)
                assert reply.status_code == 401


def test_a_request_that_is_too_large_is_rejected():
    with served(BRIGHTNESS, max_bytes=500) as url:
        far = remote(url)
        message = rf"{url}/v1/score answered 413: .*the request has \d+ bytes; the limit is 500"
        with pytest.raises(RunError, match=message):
            score(far)
        with pytest.raises(RunError, match=rf"{url}/v1/score answered 413"):
            score(far, torch.rand(4, 3, 512, 512))
        assert requests.post(f"{url}/v1/score", data=iter([b"{}"]), timeout=60).status_code == 411
        assert b" 411 " in first_line(url, "content-length: 5\r\ntransfer-encoding: chunked")


def connect(url: str, text: str = "") -> socket.socket:
    """A connection that has sent a text. Reading from it fails after minutes."""
    host, _, port = url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), 120)
    connection.sendall(text.encode())
    return connection


def post(headers: str, body: str = "") -> str:
    """The text of a POST with these headers."""
    return f"POST /v1/score HTTP/1.1\r\nhost: here\r\n{headers}\r\n\r\n{body}"


def first_line(url: str, headers: str) -> bytes:
    """The first line of the answer to a request whose body is never sent."""
    with connect(url, post(headers)) as connection:
        return connection.makefile("rb").readline()


def is_closed(connection: socket.socket) -> bool:
    """True if the server closes the connection rather than sends anything."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


HALF_SENT = "GET /health HTTP/1.1\r\nhost: he"


def test_a_connection_whose_headers_do_not_arrive_is_closed(monkeypatch):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.1)
    with served(BRIGHTNESS) as url:
        for text in ("", HALF_SENT):
            with connect(url, text) as connection:
                assert is_closed(connection)


def test_a_connection_that_goes_on_after_a_rejection_is_closed(monkeypatch):
    monkeypatch.setattr(connections, "ARRIVAL_SECONDS", 0.5)
    with served(BRIGHTNESS, token="secret") as url:
        with connect(url, post("content-length: 50", "half")) as connection:
            file = connection.makefile("rb")
            assert file.readline().startswith(b"HTTP/1.1 401 ")
            # uvicorn's own limit ends with the first byte after an answer.
            with suppress(ConnectionError):
                connection.sendall(b"more")
                file.read()
            assert is_closed(connection)


def test_half_sent_headers_on_all_connections_keep_nobody_out(monkeypatch):
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 8)
    with served(BRIGHTNESS, token="secret") as url, ExitStack() as stack:
        silent = [stack.enter_context(connect(url, HALF_SENT)) for _ in range(20)]
        headers = {"authorization": "Bearer secret"}
        reply = requests.get(f"{url}/health", headers=headers, timeout=120)
        assert reply.status_code == 200
        # The oldest are closed, and the answered one was the last of eight.
        assert all(map(is_closed, silent[:13]))


def test_half_sent_bodies_on_all_connections_keep_nobody_out(monkeypatch):
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 4)
    with served(BRIGHTNESS) as url, ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(connect(url, post("content-length: 50", "half")))
        assert torch.equal(score(remote(url)), score(BRIGHTNESS))


def test_unfinished_bodies_share_one_limit_and_leave_room_when_they_end():
    with served(BRIGHTNESS, max_bytes=4096) as url:
        part = "x" * 3800
        with ExitStack() as stack:
            unfinished = [
                stack.enter_context(connect(url, post("content-length: 4000", part)))
                for _ in range(5)
            ]
            readable, _, _ = select.select(unfinished, [], [], 120)
            answer = readable[0].recv(2**16)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert client_module.BUSY.encode() in answer
        assert score(remote(url, batch=1)).tolist() == score(BRIGHTNESS).tolist()


def test_a_request_that_does_not_arrive_times_out(monkeypatch):
    monkeypatch.setattr(connections, "ARRIVAL_SECONDS", 0.1)
    with served(BRIGHTNESS) as url:
        assert b" 408 " in first_line(url, "content-length: 50")


def test_a_picture_of_too_many_pixels_is_rejected_by_its_header():
    with served(BRIGHTNESS, max_bytes=2**28) as url:
        body = request_body(png(9000, 9000, chunk(b"IDAT", b"")))
        reply = requests.post(f"{url}/v1/score", json=body, timeout=120)
    assert reply.status_code == 413
    assert reply.json()["detail"] == "an image has 9000 x 9000 pixels; the limit is 16777216"


def test_images_that_are_too_large_when_decoded_are_rejected():
    black = png(1024, 1024, chunk(b"IDAT", zlib.compress(bytes(1024 * 3073))), chunk(b"IEND", b""))
    with served(BRIGHTNESS, max_bytes=2**22) as url:
        assert requests.post(f"{url}/v1/score", json=request_body(black), timeout=60).json() == {
            "scores": [0.0]
        }
        reply = requests.post(f"{url}/v1/score", json=request_body(black, black), timeout=60)
    assert reply.status_code == 413
    message = "the images have 6291456 bytes when decoded; the limit is 4194304"
    assert reply.json()["detail"] == message


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)


def png(width: int, height: int, *chunks: bytes) -> str:
    header = chunk(b"IHDR", width.to_bytes(4) + height.to_bytes(4) + bytes([8, 2, 0, 0, 0]))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks)).decode()


def test_texts_in_images_take_memory_one_image_at_a_time():
    megabyte = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * (2**20 - 16)))
    images = [with_chunk(30 * megabyte)] * 8
    tracemalloc.start()
    decode_images(images, 2**20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**26


def with_chunk(text: bytes) -> str:
    """The PNG with another chunk after its header."""
    data = base64.b64decode(PNG)
    return base64.b64encode(data[:33] + text + data[33:]).decode()


def sixteen_bits() -> str:
    file = io.BytesIO()
    Image.new("I;16", (8, 8), 30000).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../picture.png", "/dev/zero", "~/a.png", "a\0b", 3]
)
def test_files_outside_the_folder_of_the_server_are_not_read(name, server):
    body = request_body(PNG) | {"metadata": [{"ref_image": name}]}
    reply = requests.post(f"{server}/v1/score", json=body, timeout=60)
    assert reply.status_code == 422
    message = "ref_image must be a file in the folder that this server was started in"
    assert reply.json()["detail"] == message


@pytest.mark.parametrize("name", ["picture.png", "folder/picture.png", None])
def test_files_in_the_folder_of_the_server_may_be_named(name, server):
    reply = requests.post(
        f"{server}/v1/score",
        json=request_body(PNG) | {"metadata": [{"ref_image": name}]},
        timeout=60,
    )
    assert reply.status_code == 200


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
        (sixteen_bits(), 422),
        (png(5000, 5000, chunk(b"IDAT", b"")), 413),
        (png(50000, 50000, chunk(b"IDAT", b"")), 413),
    ],
)
def test_a_file_that_is_not_a_small_png_is_rejected(image, status, server):
    reply = requests.post(f"{server}/v1/score", json=request_body(image), timeout=60)
    assert reply.status_code == status
    assert "image" in reply.json()["detail"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (request_body(PNG, to_base64(to_pil(torch.rand(1, 3, 4, 8))[0])), "of one size"),
        (request_body(PNG) | {"prompts": []}, "as many prompts and metadata as images"),
        (request_body(), "as many prompts and metadata as images"),
        ({"images": [PNG]}, "body.prompts: Field required"),
        ({"images": ["x" * 10**5]}, "body.prompts: Field required"),
    ],
)
def test_a_request_that_cannot_be_scored_is_rejected(body, message, server):
    reply = requests.post(f"{server}/v1/score", json=body, timeout=60)
    assert reply.status_code == 422
    assert message in reply.text
    assert len(reply.text) < 200


def test_an_infinite_score_is_an_error_and_not_a_missing_one():
    with served(
        make_reward("endless", lambda images, prompts, metadata: [math.inf] * len(images))
    ) as url:
        with pytest.raises(
            RunError,
            match=rf"{url}/v1/score answered 422: .*rewards\.endless was infinite for an image",
        ):
            score(remote(url))


def test_a_busy_server_is_awaited_without_using_up_a_retry(monkeypatch):
    """One request is scored and one decoded, so a third is answered that the server is busy."""
    busy, over, scores = Event(), Event(), []

    class Recording(client_module.Busy):
        def __init__(self, problem: str) -> None:
            busy.set()
            super().__init__(problem)

    def slow(images, prompts, metadata):
        assert over.wait(60)
        return images.mean((1, 2, 3))

    monkeypatch.setattr(server_module, "QUEUE_SECONDS", 0.05)
    monkeypatch.setattr(client_module, "BUSY_PAUSE", 0.01)
    monkeypatch.setattr(client_module, "Busy", Recording)
    with served(make_reward("slow", slow)) as url:
        far = remote(url, retries=0)
        threads = [Thread(target=lambda: scores.append(score(far))) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert busy.wait(60)
        over.set()
        for thread in threads:
            thread.join()
    assert_close(torch.stack(scores), score(BRIGHTNESS).expand(3, -1))


def test_an_exception_of_a_remote_reward_is_explained_only_where_it_runs(capfd):
    calls = []

    def broken(images, prompts, metadata):
        calls.append(len(images))
        raise ValueError("no weights in /home/someone")

    with served(make_reward("broken", broken)) as url:
        with pytest.raises(RunError, match=rf"{url}/v1/score answered 422: ") as caught:
            score(remote(url))
    assert calls == [7]
    assert "the reward failed; its server printed why" in str(caught.value)
    for secret in ("ValueError", "weights", "/home", ".py"):
        assert secret not in str(caught.value)
    printed = capfd.readouterr().err
    assert "rewards.broken raised ValueError: no weights in /home/someone" in printed
    assert "test_server.py, line" in printed


@pytest.fixture
def hanging() -> Iterator[tuple[Reward, Event, Event]]:
    """A reward that hangs for black images, an event that it does, and one that ends it."""
    begun, over = Event(), Event()

    def hang(images, prompts, metadata):
        if not images.any():
            begun.set()
            over.wait(600)
        return images.mean((1, 2, 3))

    yield make_reward("hang", hang), begun, over
    over.set()


BLACK = IMAGES[:1] * 0


def test_a_reward_that_hangs_keeps_nobody_waiting(hanging, monkeypatch):
    reward, begun, over = hanging
    earlier = enumerate_threads()
    monkeypatch.setattr(server_module, "SCORING_SECONDS", 0.1)
    with served(reward, token="secret") as url:
        headers = {"authorization": "Bearer secret"}

        def ask(images: Tensor) -> requests.Response:
            body = request_body(*map(to_base64, to_pil(images)))
            return requests.post(f"{url}/v1/score", json=body, headers=headers, timeout=120)

        assert ask(BLACK).json() == {"detail": "the reward has not returned after 0.1 seconds"}
        assert begun.wait(120)
        monkeypatch.setattr(server_module, "SCORING_SECONDS", 120.0)
        # Its thread still runs, and a second call could disturb it.
        reply = ask(IMAGES)
        assert (reply.status_code, client_module.BUSY in reply.headers) == (503, False)
        assert "the reward hangs in an earlier request" in reply.text
        assert requests.get(f"{url}/health", headers=headers, timeout=120).status_code == 200
        assert requests.get(f"{url}/health", timeout=120).status_code == 401
        over.set()
        for thread in enumerate_threads():
            if thread.name == THREAD and thread not in earlier:
                thread.join(120)
        assert ask(IMAGES).json() == {"scores": score(BRIGHTNESS).tolist()}


def test_the_time_limit_of_a_reward_holds_behind_http(hanging):
    with served(replace(hanging[0], time_limit=0.1)) as url:
        with pytest.raises(RunError, match=r"has not returned after 0\.1 seconds"):
            score(remote(url, retries=0), BLACK)


def test_a_reward_that_hangs_does_not_keep_the_server_alive(hanging, monkeypatch):
    monkeypatch.setattr(connections, "STOPPING_SECONDS", 0)
    reward, begun, _ = hanging
    listening = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    server = make_server(make_app(reward, None, 2**20))
    thread = Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    body = json.dumps(request_body(to_base64(to_pil(BLACK)[0])))
    with connect(url, post(f"content-length: {len(body)}", body)) as connection:
        assert begun.wait(120)
        # What uvicorn sets at SIGTERM.
        server.should_exit = True
        answer = connection.makefile("rb").read()
    thread.join(120)
    assert not thread.is_alive()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"the server is stopping" in answer


def test_a_request_is_answered_while_others_are_decoded(monkeypatch):
    begun, over = Event(), Event()

    def slow(*arguments: Any) -> Any:
        begun.set()
        assert over.wait(120)
        return decode_request(*arguments)

    monkeypatch.setattr(server_module, "decode_request", slow)
    with served(BRIGHTNESS) as url:
        far, scores = remote(url), []
        thread = Thread(target=lambda: scores.append(score(far)))
        thread.start()
        assert begun.wait(120)
        assert requests.get(f"{url}/health", timeout=120).status_code == 200
        over.set()
        thread.join()
    assert torch.equal(scores[0], score(BRIGHTNESS))


class Learning:
    def __call__(self, images, prompts, metadata):
        return images.mean((1, 2, 3))

    def update(self, images):
        return {}

    def state(self):
        return {}

    def load_state(self, state):
        pass


def test_a_reward_that_learns_cannot_be_served():
    with pytest.raises(
        UserError, match="learning learns during training, which it cannot do behind HTTP"
    ):
        serve(make_reward("learning", Learning()), "127.0.0.1", 8123, "FLOWALIGN_TOKEN", 1)


@pytest.mark.parametrize(
    ("token", "access"),
    [("", "token not required (set FLOWALIGN_TOKEN)"), ("secret", "token required")],
)
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_the_command_prints_its_address_and_how_to_use_it(host, token, access, monkeypatch, capsys):
    started: Queue[uvicorn.Server] = Queue()

    class Recording(uvicorn.Server):
        async def startup(self, *arguments: Any, **settings: Any) -> None:
            await super().startup(*arguments, **settings)
            started.put(self)

    monkeypatch.setattr(uvicorn, "Server", Recording)
    monkeypatch.setenv("FLOWALIGN_TOKEN", token)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    status: list[int] = []
    command = ["reward", "serve", "brightness", "--host", host, "--port", str(port)]
    thread = Thread(target=lambda: status.append(main(command)))
    thread.start()
    server = started.get(timeout=60)
    assert torch.equal(score(remote(f"http://127.0.0.1:{port}")), score(BRIGHTNESS))
    server.should_exit = True
    thread.join()
    address = f"http://{socket.gethostname() if host == '0.0.0.0' else host}:{port}"
    output = capsys.readouterr().out
    assert status == [0]
    assert f"brightness at {address}, {access}" in output
    assert f'rewards: {{"{address}": 1.0}}' in output


def test_an_address_that_cannot_be_used_ends_with_one_message_and_status_2(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["reward", "serve", "brightness", "--port", str(port)]) == 2
    output = capsys.readouterr()
    assert f"The server cannot listen on 127.0.0.1, port {port}" in output.err
    assert not output.out


@pytest.fixture
def command(tmp_path, monkeypatch) -> Callable[..., list[str]]:
    """A command that trains for a few steps with the reward at an address."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "few.txt").write_text("a red circle")

    def train(url: str, retries: int) -> list[str]:
        rewards = [
            f'rewards={{"{url}": {{retries: {retries}}}}}',
            "evaluation.rewards={brightness: 1}",
        ]
        few = [
            f"evaluation.prompts={tmp_path / 'few.txt'}",
            f"output={tmp_path / 'run'}",
            "train.save_every=1",
        ]
        return ["train", str(TINY), *SMALL, *few, *rewards]

    return train


CHECKS = 6
"""Requests before a run begins: four images together, twice, and each of them alone."""


def brightness_of(body: dict[str, Any]) -> Answer:
    scores = decode_images(body["images"], 2**24).float().mean((1, 2, 3)) / 255
    return 200, json.dumps({"scores": scores.tolist()})


def until(gone: Event, good: int = CHECKS + 1) -> Callable[[dict[str, Any]], Answer]:
    """Brightness for some requests, one per step after the checks, then broken connections."""
    left = [None] * good

    def answer(body: dict[str, Any]) -> Answer:
        if not left:
            gone.set()
            return None
        left.pop()
        return brightness_of(body)

    return answer


def test_a_run_survives_a_restart_of_its_server(command, tmp_path):
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


SERVE = "import sys; from flowalign.cli import main; sys.exit(main())"


@contextmanager
def server_process(port: int) -> Iterator[None]:
    """A server in a process of its own, from its first answer until it is killed."""
    options = ["reward", "serve", "brightness", "--port", str(port)]
    nowhere = subprocess.DEVNULL
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, *options], env=ENVIRONMENT, stdout=nowhere, stderr=nowhere
    )
    try:
        while not is_healthy(port):
            assert process.poll() is None
        yield
    finally:
        process.kill()
        process.wait()


def is_healthy(port: int) -> bool:
    try:
        return requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok
    except requests.RequestException:
        return False


def keep_busy(port: int, over: Event) -> None:
    """Ask for scores without a pause, also while nobody answers."""
    body = request_body(*[PNG] * 8)
    while not over.is_set():
        with suppress(requests.RequestException):
            requests.post(f"http://127.0.0.1:{port}/v1/score", json=body, timeout=60)


@pytest.mark.slow
def test_a_server_killed_and_started_again_under_load_changes_no_bit(command, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    train = [*command(f"http://127.0.0.1:{port}", retries=20), "train.steps=8"]
    with server_process(port):
        assert main(train) == 0
    (tmp_path / "run").rename(tmp_path / "undisturbed")
    over, steps = Event(), []

    def keep_restarting() -> None:
        while not over.is_set():
            with server_process(port):
                started.set()
                over.wait(3)
            steps.append(len(read_metrics(tmp_path / "run")))

    started = Event()
    others = [Thread(target=keep_busy, args=(port, over)) for _ in range(4)]
    threads = [Thread(target=keep_restarting), *others]
    for thread in threads:
        thread.start()
    try:
        assert started.wait(60)
        assert main(train) == 0
    finally:
        over.set()
        for thread in threads:
            thread.join()
    # At least one server was killed between the first step and the last.
    assert any(0 < step < 8 for step in steps)
    assert same_adapter(tmp_path / "run", tmp_path / "undisturbed")


def test_a_run_whose_server_stays_away_stops_and_can_be_resumed(command, tmp_path, capsys):
    with answering(until(Event())) as url:
        assert main(command(url, retries=1)) == 1
    error = capsys.readouterr().err
    assert f"{url}/v1/score did not answer" in error
    assert f"The finished steps are in {checkpoints(tmp_path / 'run')[-1]}." in error
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1]
    assert main(command(url, retries=1)) == 2
    assert f"{url}/health did not answer" in capsys.readouterr().err
    with served(BRIGHTNESS, port=int(url.rpartition(":")[2])):
        assert main(command(url, retries=1)) == 0
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2]


def test_malformed_answers_lose_no_step(command, tmp_path, capsys):
    """Each run gets good answers for one step, then a malformed one, and the next run resumes."""
    malformed = ["<html>", '{"scores": [NaN, 0, 0, 0, 0, 0]}', '{"scores": [0.5]}']
    good = [CHECKS + 1]

    def answer(body: dict[str, Any]) -> Answer:
        good[0] -= 1
        return brightness_of(body) if good[0] >= 0 else (200, malformed[0])

    with answering(answer) as url:
        for step in (1, 2, 3):
            assert main([*command(url, retries=0), "train.steps=4"]) == 1
            error = capsys.readouterr().err
            assert f"rewards.{url} answered" in error
            (*_, last) = checkpoints(tmp_path / "run")
            assert f"The finished steps are in {last}." in error
            assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(
                range(1, step + 1)
            )
            malformed.pop(0)
            good[0] = CHECKS + 1
        assert main([*command(url, retries=0), "train.steps=4"]) == 0
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]
