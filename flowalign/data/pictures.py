"""Open pictures from bytes."""

import io

from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from flowalign.errors import UserError


def open_picture(data: bytes) -> Image.Image:
    """Turned as its camera says, on white where it is transparent. ValueError where the bytes are no picture."""
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGBA")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"no picture: {error}") from error
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def load_picture(data: bytes, height: int, width: int, where: str = "data.pairs") -> Tensor:
    """(3, H, W) in [0, 1], scaled to fill and cut to the middle. UserError where the bytes are no picture."""
    try:
        image = open_picture(data)
    except ValueError as error:
        raise UserError(f"{where} holds something that is {error}") from error
    return (
        pil_to_tensor(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)).float() / 255
    )
