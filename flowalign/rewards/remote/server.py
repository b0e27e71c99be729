"""A reward behind HTTP, for scorers that need another environment or another GPU: flowalign reward serve SPEC."""

import asyncio
import base64
import hmac
import io
import math
import socket
import struct
from contextlib import suppress
from pathlib import Path
from threading import Lock, Semaphore
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel
from torchvision.transforms.functional import pil_to_tensor

from flowalign import distributed
from flowalign.errors import RunError, UserError
from flowalign.rewards.base import Reward
from flowalign.rewards.remote.client import BUSY, token_in

TURN = 5.0
"""Seconds after which a request that waits for others is told so, to be sent again."""
ARRIVAL = 60.0
"""Seconds in which a request has to arrive."""


class Asked(BaseModel):
    """Images as base64 PNG, with as many prompts and as many metadata."""

    images: list[str]
    prompts: list[str]
    metadata: list[dict[str, Any]]


def make_app(reward: Reward, token: str | None, max_bytes: int) -> FastAPI:
    """The server of one reward. Requests without the token, or above `max_bytes` as sent or unpacked, are refused."""
    app = FastAPI(
        title=f"flowalign reward {reward.name}", docs_url=None, redoc_url=None, openapi_url=None
    )
    room, one_at_a_time = Semaphore(2), Lock()  # one request is scored while the next is unpacked

    @app.middleware("http")
    async def admitted(request: Request, answer: Any) -> Any:
        if refused := refused_unread(request, token, max_bytes):
            return refused
        try:
            await asyncio.wait_for(request.body(), ARRIVAL)
        except TimeoutError:
            return refusal(408, f"the request did not arrive in {ARRIVAL:g} seconds")
        return await answer(request)

    @app.exception_handler(RequestValidationError)
    def misshapen(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return refusal(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        ends = [end if math.isfinite(end) else None for end in reward.traits.range]
        return {
            "name": reward.name,
            "level": "group" if reward.of_groups else "pointwise",
            "range": ends,
        }

    @app.post("/v1/score")
    def score(asked: Asked) -> dict[str, Any]:
        counts = {len(asked.images), len(asked.prompts), len(asked.metadata)}
        if len(counts) != 1 or counts == {0}:
            raise HTTPException(422, "give as many prompts and metadata as images, one at least")
        if not room.acquire(timeout=TURN):
            raise HTTPException(503, "busy with other requests", {BUSY: "yes"})
        try:
            refuse_other_files(asked.metadata)
            pictures = unpacked(asked.images, max_bytes)
            with one_at_a_time:
                scores = reward(
                    pictures.to(distributed.device()).float() / 255, asked.prompts, asked.metadata
                )
        except RunError as error:
            raise HTTPException(422, str(error)) from error
        finally:
            room.release()
        if scores.isinf().any():
            raise HTTPException(422, f"rewards.{reward.name} was infinite for a picture")
        return {"scores": [None if math.isnan(value) else value for value in scores.tolist()]}

    return app


def refused_unread(request: Request, token: str | None, max_bytes: int) -> JSONResponse | None:
    """The answer to a request that need not be read."""
    given, size = (
        request.headers.get("authorization", ""),
        request.headers.get("content-length", "0"),
    )
    if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        return refusal(401, "the token is missing or wrong")
    if (
        "transfer-encoding" in request.headers
        or not size.isdecimal()
        or (request.method == "POST" and int(size) == 0)
    ):
        return refusal(411, "say the content-length, and send no chunks")
    if int(size) > max_bytes:
        return refusal(413, f"the request has {size} bytes; at most {max_bytes} are taken")
    return None


def refusal(status: int, why: str) -> JSONResponse:
    return JSONResponse({"detail": why}, status)


def refuse_other_files(metadata: list[dict[str, Any]]) -> None:
    """HTTPException where a prompt's reference picture is not in the folder that the server was started in."""
    here = Path.cwd().resolve()
    for name in filter(None, (entry.get("ref_image") for entry in metadata)):
        if (
            not isinstance(name, str)
            or "\0" in name
            or not (here / name).resolve().is_relative_to(here)
        ):
            raise HTTPException(
                422, "ref_image must be a file in the folder that this server was started in"
            )


def unpacked(images: list[str], max_bytes: int) -> torch.Tensor:
    """(B, 3, H, W) bytes of base64 PNGs of one size. HTTPException where they are none, or too large to be opened."""
    try:
        files = [base64.b64decode(text, validate=True) for text in images]
        headers = [(file[:8] + file[12:16], *struct.unpack(">IIB", file[16:25])) for file in files]
        if any(start != b"\x89PNG\r\n\x1a\nIHDR" or depth > 8 for start, _, _, depth in headers):
            raise ValueError("it must begin as one, of 8 bits a channel")
        if len({(width, height) for _, width, height, _ in headers}) > 1:
            raise HTTPException(422, "the images of a request must be of one size")
        if (size := 3 * len(files) * headers[0][1] * headers[0][2]) > max_bytes:
            raise HTTPException(
                413, f"the images have {size} bytes when unpacked; at most {max_bytes} are taken"
            )
        return torch.stack(
            [
                pil_to_tensor(Image.open(io.BytesIO(file), formats=["PNG"]).convert("RGB"))
                for file in files
            ]
        )
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError, struct.error) as error:
        raise HTTPException(422, f"an image is no base64 PNG: {error}") from error


def listen(host: str, port: int) -> socket.socket:
    """Where requests come in. UserError where that cannot be."""
    try:
        return socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        raise UserError(
            f"{host}, port {port} cannot be listened at ({error}); choose others with --host and --port."
        ) from None


def serve(reward: Reward, host: str, port: int, token_variable: str, max_megabytes: int) -> None:
    """Until it is interrupted."""
    if reward.learner:
        raise UserError(
            f"{reward.name} learns as training goes, and behind HTTP it would not; name it in the rewards of the run."
        )
    token = token_in(token_variable)
    with listen(host, port) as incoming:
        address = f"http://{socket.gethostname() if host in ('', '0.0.0.0') else host}:{port}"
        print(
            f"{reward.name} at {address}, token {'asked for' if token else f'not asked for (set {token_variable})'}"
        )
        print(f'Use it with   rewards: {{"{address}": 1.0}}', flush=True)
        config = uvicorn.Config(make_app(reward, token, max_megabytes * 2**20), log_level="warning")
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[incoming])
