"""A reward behind HTTP, for scorers that need another environment or another GPU: flowalign reward serve SPEC."""

import base64
import binascii
import hmac
import io
import math
import os
from threading import Lock
from typing import Any

import torch
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel
from torchvision.transforms.functional import pil_to_tensor

from flowalign.errors import RunError, UserError
from flowalign.rewards.base import Reward

MAX_PIXELS = 4096 * 4096


class Asked(BaseModel):
    """Images as base64 PNG, with as many prompts and as many metadata."""

    images: list[str]
    prompts: list[str]
    metadata: list[dict[str, Any]]


def make_app(reward: Reward, token: str | None, max_bytes: int, device: str = "cpu") -> FastAPI:
    """The server of one reward. Requests above `max_bytes` or without the token are refused."""
    app = FastAPI(title=f"flowalign reward {reward.name}", docs_url=None, redoc_url=None, openapi_url=None)
    one_at_a_time = Lock()

    def allowed(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, "the token is missing or wrong")

    @app.middleware("http")
    async def limited(request: Request, answer: Any) -> Any:
        size = request.headers.get("content-length", "0")
        if request.method == "POST" and (not size.isdigit() or int(size) == 0):
            return JSONResponse({"detail": "say the content-length"}, 411)
        if int(size) > max_bytes:
            return JSONResponse({"detail": f"the request has {size} bytes; at most {max_bytes} are taken"}, 413)
        return await answer(request)

    @app.get("/health", dependencies=[Depends(allowed)])
    def health() -> dict[str, Any]:
        ends = [end if math.isfinite(end) else None for end in reward.traits.range]
        return {"name": reward.name, "level": "group" if reward.of_groups else "pointwise", "range": ends}

    @app.post("/v1/score", dependencies=[Depends(allowed)])
    def score(asked: Asked) -> dict[str, Any]:
        counts = {len(asked.images), len(asked.prompts), len(asked.metadata)}
        if len(counts) != 1 or counts == {0}:
            raise HTTPException(422, "give as many prompts and metadata as images, one at least")
        images = torch.stack(same_size([picture(text) for text in asked.images])).float() / 255
        try:
            with one_at_a_time:
                scores = reward(images.to(device), asked.prompts, asked.metadata)
        except RunError as error:
            raise HTTPException(422, str(error)) from error
        return {"scores": [None if math.isnan(value) else value for value in scores.tolist()]}

    return app


def picture(text: str) -> torch.Tensor:
    """(3, H, W) bytes of a base64 PNG. HTTPException when it is none."""
    try:
        opened = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
        if opened.width * opened.height > MAX_PIXELS:
            raise HTTPException(413, f"an image has {opened.width} x {opened.height} pixels; at most {MAX_PIXELS} are taken")
        return pil_to_tensor(opened.convert("RGB"))
    except (binascii.Error, UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise HTTPException(422, f"an image is no base64 PNG: {error}") from error


def same_size(pictures: list[torch.Tensor]) -> list[torch.Tensor]:
    if len({tuple(found.shape) for found in pictures}) > 1:
        raise HTTPException(422, "the images of a request must be of one size")
    return pictures


def serve(reward: Reward, host: str, port: int, token_variable: str, max_megabytes: int) -> None:
    """Until it is interrupted."""
    import uvicorn

    if reward.learner:
        raise UserError(
            f"{reward.name} learns as training goes, and behind HTTP it would not; name it in the rewards of the run."
        )
    token = os.environ.get(token_variable)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{reward.name} at http://{host}:{port}, token {'asked for' if token else f'not asked for (set {token_variable})'}")
    print(f'Use it with   rewards: {{"http://{host}:{port}": 1.0}}', flush=True)
    uvicorn.run(make_app(reward, token, max_megabytes * 2**20, device), host=host, port=port, log_level="warning")
