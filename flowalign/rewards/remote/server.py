"""Serve a reward over HTTP, for scorers that need another environment or another GPU.

`flowalign reward serve SPEC` runs it. The protocol is described in rewards/remote/client.py.
Requests come from other machines, so everything in them is checked before memory is spent on it.
"""

import asyncio
import base64
import hmac
import io
import math
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from threading import Lock, Semaphore

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel
from torchvision.transforms.functional import pil_to_tensor

from flowalign import distributed
from flowalign.data.prompts import Metadata
from flowalign.errors import RunError, UserError
from flowalign.rewards.base import Reward
from flowalign.rewards.reference_pictures import reference_path
from flowalign.rewards.remote.client import BUSY, token_in

QUEUE_SECONDS = 5.0
"""How long a request waits for others before the client is asked to send it again."""
ARRIVAL_SECONDS = 60.0
"""How long a request may take to arrive."""
PNG_START = b"\x89PNG\r\n\x1a\nIHDR"


class ScoreRequest(BaseModel):
    """The body of /v1/score."""

    images: list[str]
    """PNG files in base64, all of one size."""
    prompts: list[str]
    """One per image."""
    metadata: list[Metadata]
    """One per image."""


def make_app(reward: Reward, token: str | None, max_bytes: int) -> FastAPI:
    """Make the server of one reward.

    Requests without the token, or larger than `max_bytes` as sent or decoded, are rejected.
    """
    title = f"flowalign reward {reward.name}"
    app = FastAPI(title=title, docs_url=None, redoc_url=None, openapi_url=None)
    scorer = _Scorer(reward, max_bytes)

    @app.middleware("http")
    async def admit(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        rejection = reject_unread(request, token, max_bytes)
        if rejection:
            return rejection
        try:
            await asyncio.wait_for(request.body(), ARRIVAL_SECONDS)
        except TimeoutError:
            return error_reply(408, f"the request did not arrive in {ARRIVAL_SECONDS:g} seconds")
        return await answer(request)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # The first problem only: the default lists all, and repeats the images in its answer.
        first = error.errors()[0]
        return error_reply(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")

    @app.get("/health")
    async def health() -> dict[str, object]:
        ends = [end if math.isfinite(end) else None for end in reward.traits.range]
        level = "group" if reward.of_groups else "pointwise"
        return {"name": reward.name, "level": level, "range": ends}

    @app.post("/v1/score")
    def score(body: ScoreRequest) -> dict[str, object]:
        return {"scores": scorer(body)}

    return app


class _Scorer:
    """Scores one request at a time, while a second one is decoded and others wait."""

    def __init__(self, reward: Reward, max_bytes: int) -> None:
        self.reward, self.max_bytes = reward, max_bytes
        self.slots, self.one_at_a_time = Semaphore(2), Lock()

    def __call__(self, body: ScoreRequest) -> list[float | None]:
        counts = {len(body.images), len(body.prompts), len(body.metadata)}
        if len(counts) != 1 or counts == {0}:
            raise HTTPException(422, "give as many prompts and metadata as images, at least one")
        # The client repeats a 503, which keeps the number of requests in memory at two.
        if not self.slots.acquire(timeout=QUEUE_SECONDS):
            raise HTTPException(503, "busy with other requests", {BUSY: "yes"})
        try:
            reject_foreign_files(body.metadata)
            pixels = decode_images(body.images, self.max_bytes)
            with self.one_at_a_time:
                images = pixels.to(distributed.device()).float() / 255
                scores = self.reward(images, body.prompts, body.metadata)
        except RunError as error:
            raise HTTPException(422, str(error)) from error
        finally:
            self.slots.release()
        if scores.isinf().any():
            raise HTTPException(422, f"rewards.{self.reward.name} was infinite for an image")
        return [None if math.isnan(value) else value for value in scores.tolist()]


def reject_unread(request: Request, token: str | None, max_bytes: int) -> JSONResponse | None:
    """Return the answer to a request that is rejected by its headers, or None."""
    sent = request.headers.get("authorization", "")
    # `compare_digest` takes the same time for every wrong token.
    if token and not hmac.compare_digest(sent.encode(), f"Bearer {token}".encode()):
        return error_reply(401, "the token is missing or wrong")
    size = request.headers.get("content-length", "0")
    if "transfer-encoding" in request.headers or not size.isdecimal():
        return error_reply(411, "send a content-length, and no chunks")
    if request.method == "POST" and int(size) == 0:
        return error_reply(411, "send a body and its content-length")
    if int(size) > max_bytes:
        return error_reply(413, f"the request has {size} bytes; the limit is {max_bytes}")
    return None


def error_reply(status: int, detail: str) -> JSONResponse:
    """Return an answer in the form of FastAPI's own errors."""
    return JSONResponse({"detail": detail}, status)


def reject_foreign_files(metadata: list[Metadata]) -> None:
    """Raise HTTPException if a reference image is outside the folder the server was started in."""
    folder = Path.cwd().resolve()
    for name in filter(None, (entry.get("ref_image") for entry in metadata)):
        is_path = isinstance(name, str) and "\0" not in name
        if not is_path or not (folder / reference_path(name)).resolve().is_relative_to(folder):
            raise HTTPException(
                422, "ref_image must be a file in the folder that this server was started in"
            )


def decode_images(images: list[str], max_bytes: int) -> torch.Tensor:
    """Decode base64 PNGs of one size to bytes (B, 3, H, W).

    Raises HTTPException if one is not a PNG of 8 bits, or if they are too large to be decoded.
    """
    try:
        files = [base64.b64decode(text, validate=True) for text in images]
        width, height = _common_size(files)
        # Known from the headers, before any pixel takes memory.
        size = 3 * len(files) * width * height
        if size > max_bytes:
            raise HTTPException(
                413, f"the images have {size} bytes when decoded; the limit is {max_bytes}"
            )
        return torch.stack([_decode(file) for file in files])
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError, struct.error) as error:
        raise HTTPException(422, f"an image is not a base64 PNG: {error}") from error


def _common_size(files: list[bytes]) -> tuple[int, int]:
    """Return width and height of PNG files, from their headers."""
    sizes = set()
    for file in files:
        width, height, depth = struct.unpack(">IIB", file[16:25])
        if file[:8] + file[12:16] != PNG_START or depth > 8:
            raise ValueError("it must begin as one, with 8 bits per channel")
        sizes.add((width, height))
    if len(sizes) > 1:
        raise HTTPException(422, "the images of a request must be of one size")
    return sizes.pop()


def _decode(file: bytes) -> torch.Tensor:
    return pil_to_tensor(Image.open(io.BytesIO(file), formats=["PNG"]).convert("RGB"))


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
        config = uvicorn.Config(make_app(reward, token, max_megabytes * 2**20), log_level="warning")
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[incoming])
