"""Read the body of a request for scores, without spending memory on what is too large.

Requests come from other machines, so the sizes of pictures are read from their headers first.
"""

import base64
import io
import struct
from dataclasses import dataclass
from typing import Annotated

import torch
from fastapi import HTTPException
from PIL import Image
from pydantic import BaseModel, FailFast, ValidationError
from torchvision.transforms.functional import pil_to_tensor

from flowalign.data.prompts import Metadata

MAX_PIXELS = 2**24
"""The most pixels of one picture: 4096 x 4096."""
PNG_START = b"\x89PNG\r\n\x1a\nIHDR"


class ScoreRequest(BaseModel):
    """The body of /v1/score."""

    # Without FailFast, each of a million wrong entries would make an error of its own.
    images: Annotated[list[str], FailFast()]
    """PNG files in base64, all of one size."""
    prompts: Annotated[list[str], FailFast()]
    """One per image."""
    metadata: Annotated[list[Metadata], FailFast()]
    """One per image."""


@dataclass(frozen=True)
class DecodedRequest:
    """The arguments of a call of a reward, with pixels as bytes."""

    pixels: torch.Tensor  # (B, 3, H, W), bytes
    prompts: list[str]
    metadata: list[Metadata]


def decode_request(body: bytearray, max_bytes: int) -> DecodedRequest:
    """Read the body of a request.

    Raises HTTPException if it is malformed, or if its images have more than `max_bytes` as pixels.
    """
    try:
        request = ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        # The first problem only, and without the input, which holds the images.
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, ("body", *first["loc"])))
        raise HTTPException(422, f"{place}: {first['msg']}") from None
    counts = {len(request.images), len(request.prompts), len(request.metadata)}
    if len(counts) != 1 or counts == {0}:
        raise HTTPException(422, "give as many prompts and metadata as images, at least one")
    pixels = decode_images(request.images, max_bytes)
    return DecodedRequest(pixels, request.prompts, request.metadata)


def decode_images(images: list[str], max_bytes: int) -> torch.Tensor:
    """Decode base64 PNGs of one size to bytes (B, 3, H, W).

    Raises HTTPException if one is not a PNG of 8 bits, or if they are too large to be decoded.
    """
    try:
        files = [base64.b64decode(text, validate=True) for text in images]
        width, height = _common_size(files)
        _check_size(len(files), width, height, max_bytes)
        pixels = torch.empty(len(files), 3, height, width, dtype=torch.uint8)
        for place, file in zip(pixels, files, strict=True):
            place.copy_(_decode(file))
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError, struct.error):
        # The text of the exception may name paths and addresses in memory.
        raise HTTPException(
            422, "an image is not a base64 PNG with 8 bits per channel, or is damaged"
        ) from None
    return pixels


def _check_size(count: int, width: int, height: int, max_bytes: int) -> None:
    """Raise HTTPException for sizes in headers that would take too much memory."""
    if width * height > MAX_PIXELS:
        raise HTTPException(
            413, f"an image has {width} x {height} pixels; the limit is {MAX_PIXELS}"
        )
    size = 3 * count * width * height
    if size > max_bytes:
        raise HTTPException(
            413, f"the images have {size} bytes when decoded; the limit is {max_bytes}"
        )


def _common_size(files: list[bytes]) -> tuple[int, int]:
    """Return width and height of PNG files, from their headers."""
    sizes = set()
    for file in files:
        width, height, depth = struct.unpack(">IIB", file[16:25])
        if file[:8] + file[12:16] != PNG_START or depth > 8:
            raise ValueError("not a PNG with 8 bits per channel")
        sizes.add((width, height))
    if len(sizes) > 1:
        raise HTTPException(422, "the images of a request must be of one size")
    return sizes.pop()


def _decode(file: bytes) -> torch.Tensor:
    return pil_to_tensor(Image.open(io.BytesIO(file), formats=["PNG"]).convert("RGB"))
