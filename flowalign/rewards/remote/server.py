"""Serve a reward over HTTP, for scorers that need another environment or another GPU.

`flowalign reward serve SPEC` runs it. The protocol is described in rewards/remote/client.py.
Requests come from other machines, so everything in them is checked before memory is spent on it,
and answers say nothing about files and exceptions of this one.
"""

import asyncio
import hmac
import math
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

from fastapi import Depends, FastAPI, HTTPException, Request
from starlette.requests import ClientDisconnect

from flowalign import distributed
from flowalign.data.prompts import Metadata
from flowalign.errors import RunError, UserError
from flowalign.flow import PerImage
from flowalign.rewards.base import Reward
from flowalign.rewards.reference_pictures import reference_path
from flowalign.rewards.remote import connections
from flowalign.rewards.remote.client import BUSY, token_in
from flowalign.rewards.remote.decoding import decode_request, DecodedRequest
from flowalign.rewards.worker import in_background

QUEUE_SECONDS = 5.0
"""How long a request waits for others before the client is asked to send it again."""
SCORING_SECONDS = 600.0
"""How long a call of a reward without `time_limit` may take."""
BODIES = 4
"""How many of the largest requests may be in memory at once."""


def make_app(reward: Reward, token: str | None, max_bytes: int) -> FastAPI:
    """Make the server of one reward.

    Requests without the token, or larger than `max_bytes` as sent or decoded, are rejected.
    """

    async def admit(request: Request) -> None:
        reject_unread(request, token, max_bytes)

    title = f"flowalign reward {reward.name}"
    app = FastAPI(
        title=title,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        dependencies=[Depends(admit)],
    )
    scorer, intake = _Scorer(reward, max_bytes), _Intake(BODIES * max_bytes)

    @app.get("/health")
    async def health() -> dict[str, object]:
        ends = [end if math.isfinite(end) else None for end in reward.traits.range]
        level = "group" if reward.of_groups else "pointwise"
        return {"name": reward.name, "level": level, "range": ends}

    # FastAPI would parse a declared body before this function could refuse it.
    @app.post("/v1/score")
    async def score(request: Request) -> dict[str, object]:
        try:
            async with intake.body(request) as body:
                return {"scores": await scorer(body)}
        # The server is about to end. The client repeats the request, by then to the next one.
        except asyncio.CancelledError:
            raise HTTPException(503, "the server is stopping") from None

    return app


def reject_unread(request: Request, token: str | None, max_bytes: int) -> None:
    """Raise HTTPException for a request that is rejected by its headers."""
    sent = request.headers.get("authorization", "")
    # `compare_digest` takes the same time for every wrong token.
    if token and not hmac.compare_digest(sent.encode(), f"Bearer {token}".encode()):
        raise HTTPException(401, "the token is missing or wrong")
    size = request.headers.get("content-length", "0")
    if "transfer-encoding" in request.headers or not size.isdecimal():
        raise HTTPException(411, "send a content-length, and no chunks")
    if request.method == "POST" and int(size) == 0:
        raise HTTPException(411, "send a body and its content-length")
    if int(size) > max_bytes:
        raise HTTPException(413, f"the request has {size} bytes; the limit is {max_bytes}")


class _Intake:
    """Reads bodies, with a limit on the time of each and on the bytes of all together."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.held = max_bytes, 0

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytearray]:
        """Read the body of a request, which counts as held until the context ends.

        Raises HTTPException if it does not arrive, or if there is no room for it.
        """
        body = bytearray()
        try:
            await self._read(request, body)
            yield body
        finally:
            self.held -= len(body)

    async def _read(self, request: Request, body: bytearray) -> None:
        try:
            async with asyncio.timeout(connections.ARRIVAL_SECONDS):
                async for piece in request.stream():
                    body += piece
                    self.held += len(piece)
                    # The bytes that arrived are counted, not the announced ones: announcing a
                    # large request costs nothing, and would keep others out.
                    if self.held > self.max_bytes:
                        raise _busy()
        except TimeoutError:
            seconds = connections.ARRIVAL_SECONDS
            raise HTTPException(408, f"the request did not arrive in {seconds:g} seconds") from None
        except ClientDisconnect:
            raise HTTPException(400, "the request is incomplete") from None


class _Scorer:
    """Scores one request at a time, while a second one is decoded and others wait."""

    def __init__(self, reward: Reward, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        # The limit is kept here, because a call that exceeds it must keep out all later ones.
        self.reward, self.time_limit = replace(reward, time_limit=None), reward.time_limit
        self.slots, self.one_at_a_time = asyncio.Semaphore(2), asyncio.Lock()
        self.hanging: asyncio.Future[PerImage] | None = None

    async def __call__(self, body: bytearray) -> list[float | None]:
        # The client repeats a 503, which keeps the number of decoded requests at two.
        try:
            async with asyncio.timeout(QUEUE_SECONDS):
                await self.slots.acquire()
        except TimeoutError:
            raise _busy() from None
        try:
            request = await asyncio.wrap_future(in_background(self._decode, body))
            async with self.one_at_a_time:
                scores = await self._score(request)
        finally:
            self.slots.release()
        if scores.isinf().any():
            raise HTTPException(422, f"rewards.{self.reward.name} was infinite for an image")
        return [None if math.isnan(value) else value for value in scores.tolist()]

    def _decode(self, body: bytearray) -> DecodedRequest:
        request = decode_request(body, self.max_bytes)
        reject_foreign_files(request.metadata)
        return request

    async def _score(self, request: DecodedRequest) -> PerImage:
        if self.hanging and not self.hanging.done():
            raise HTTPException(503, "the reward hangs in an earlier request; restart the server")
        call = asyncio.wrap_future(in_background(self._call, request))
        seconds = self.time_limit or SCORING_SECONDS
        done, _ = await asyncio.wait({call}, timeout=seconds)
        if not done:
            self.hanging = call
            problem = f"the reward has not returned after {seconds:g} seconds"
            print(f"{self.reward.name}: {problem}.", file=sys.stderr, flush=True)
            raise HTTPException(503, problem)
        try:
            return call.result()
        except RunError as error:
            print(error, file=sys.stderr, flush=True)
            raise HTTPException(422, "the reward failed; its server printed why") from None

    def _call(self, request: DecodedRequest) -> PerImage:
        images = request.pixels.to(distributed.device()).float().div_(255)
        return self.reward(images, request.prompts, request.metadata)


def _busy() -> HTTPException:
    return HTTPException(503, "busy with other requests", {BUSY: "yes"})


def reject_foreign_files(metadata: list[Metadata]) -> None:
    """Raise HTTPException if a reference image is outside the folder the server was started in."""
    folder = Path.cwd().resolve()
    for name in filter(None, (entry.get("ref_image") for entry in metadata)):
        is_path = isinstance(name, str) and "\0" not in name
        if not is_path or not (folder / reference_path(name)).resolve().is_relative_to(folder):
            raise HTTPException(
                422, "ref_image must be a file in the folder that this server was started in"
            )


def listen(host: str, port: int) -> socket.socket:
    """Open the listening socket. Raises UserError if the address cannot be used."""
    try:
        return socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        raise UserError(
            f"The server cannot listen on {host}, port {port} ({error}). "
            "Choose others with --host and --port."
        ) from None


def serve(reward: Reward, host: str, port: int, token_variable: str, max_megabytes: int) -> None:
    """Serve a reward until the process is interrupted.

    Raises UserError for a reward that learns: its `update` would not be called.
    """
    if reward.learner:
        # A server sees single requests, not steps, and ranks of a run would disturb each other.
        raise UserError(
            f"{reward.name} learns during training, which it cannot do behind HTTP. "
            "Name it in the rewards of the run."
        )
    token = token_in(token_variable)
    with listen(host, port) as incoming:
        name = socket.gethostname() if host in ("", "0.0.0.0") else host
        address = f"http://{name}:{port}"
        access = "required" if token else f"not required (set {token_variable})"
        print(f"{reward.name} at {address}, token {access}")
        print(f'Use it with   rewards: {{"{address}": 1.0}}', flush=True)
        server = connections.make_server(make_app(reward, token, max_megabytes * 2**20))
        with suppress(KeyboardInterrupt):
            server.run(sockets=[incoming])
