"""Decode image files into tensors, in the form that the autoencoder and the rewards take."""

import io

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from flowalign.errors import UserError


def open_picture(data: bytes) -> Image.Image:
    """Decode an image file into an RGB picture: rotated by its EXIF tag, transparency over white.

    Grey values of 16 bits are scaled to 8, and floating-point ones in [0, 1] to [0, 255].
    Raises ValueError if the bytes are not an image, or if its range of values is not known.
    """
    try:
        # `Image.open` reads the header only. The conversion decodes, so it belongs in the `try`.
        image = _in_bytes(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
        # Faster than the way over RGBA, for the same bytes.
        if not image.has_transparency_data:
            return image.convert("RGB")
        image = image.convert("RGBA")
    except MemoryError:
        raise
    except Exception as error:
        # Damaged files make Pillow's decoders raise many types, such as struct.error and EOFError.
        raise ValueError(str(error) or type(error).__name__) from error
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _in_bytes(image: Image.Image) -> Image.Image:
    """Return a picture whose values are bytes. Raises ValueError if their range is not known."""
    # Pillow's own conversion of these modes cuts every value above 255, without a warning.
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # also if one is NaN
            raise ValueError(
                f"its floating-point values reach from {values.min():g} to {values.max():g}, and "
                "only values from 0 to 1 have a known meaning"
            )
        return Image.fromarray((values * 255).round().astype(np.uint8))
    if image.mode == "I":
        raise ValueError("its values are 32-bit integers, whose range is not known")
    return image


def load_picture(data: bytes, height: int, width: int, where: str = "data.pairs") -> Tensor:
    """Decode an image file into (3, height, width) in [0, 1], scaled to cover and center-cropped.

    Raises UserError if the bytes are not an image; `where` names the entry in the message.
    """
    fitted = ImageOps.fit(named_picture(data, where), (width, height), Image.Resampling.LANCZOS)
    return pil_to_tensor(fitted).float() / 255


def named_picture(data: bytes, where: str) -> Image.Image:
    """Decode an image file as `open_picture` does. Raises UserError that begins with `where`."""
    try:
        return open_picture(data)
    except ValueError as error:
        raise UserError(
            f"{where} cannot be opened as an image: {error}. Replace the file, for example by a "
            "PNG of 8 bits, or remove the entry."
        ) from error
