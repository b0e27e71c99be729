"""Decode image files into tensors, in the form that the autoencoder and the rewards take."""

import io

from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from flowalign.errors import UserError


def open_picture(data: bytes) -> Image.Image:
    """Decode an image file into an RGB picture: rotated by its EXIF tag, transparency over white.

    Raises ValueError if the bytes are not an image.
    """
    try:
        # `Image.open` reads the header only. The conversion decodes, so it belongs in the `try`.
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGBA")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def load_picture(data: bytes, height: int, width: int, where: str = "data.pairs") -> Tensor:
    """Decode an image file into (3, height, width) in [0, 1], scaled to cover and center-cropped.

    Raises UserError if the bytes are not an image; `where` names the entry in the message.
    """
    try:
        image = open_picture(data)
    except ValueError as error:
        raise UserError(
            f"{where} cannot be opened as an image: {error}. Replace the file or remove the entry."
        ) from error
    fitted = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return pil_to_tensor(fitted).float() / 255
