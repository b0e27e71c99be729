"""Picture files that rewards compare with: whole folders, or the one that a prompt names as its `ref_image`."""

from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from flowalign.data.pictures import open_picture
from flowalign.errors import RunError, UserError

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def picture_files(pictures: Any, key: str) -> list[Path]:
    """The pictures of a folder and its folders, by name, or those of a list. UserError when there are none."""
    named = [pictures] if isinstance(pictures, str) else pictures
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise UserError(f"{key} is {pictures!r}; write a folder, or a list of picture files.")
    files = []
    for place in (Path(name).expanduser() for name in named):
        if not place.exists():
            raise UserError(f"{key}: there is no file or folder {place}.")
        files += (
            sorted(f for f in place.rglob("*") if f.suffix.lower() in SUFFIXES)
            if place.is_dir()
            else [place]
        )
    if not files:
        raise UserError(
            f"{key}: {pictures} has no pictures; their names end in {', '.join(sorted(SUFFIXES))}."
        )
    return files


def read_picture(file: Path, key: str) -> Image.Image:
    """As pairs are read. UserError names a file that is no picture."""
    try:
        return open_picture(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {file} is no picture: {error}") from error


def reference_file(name: str, prompt: str, entry: dict[str, Any]) -> str | None:
    """The file of the picture that a prompt is compared with; None where its pictures are not to be scored."""
    if "ref_image" not in entry:
        raise RunError(
            f"rewards.{name}: the prompt {prompt!r} has no field 'ref_image'. Write it in a .jsonl file as "
            '{"prompt": "...", "ref_image": "picture.png"}, or with null to leave its pictures unscored.'
        )
    return entry["ref_image"] or None


def read_reference(name: str, file: str) -> Image.Image:
    """RunError names a file that is no picture."""
    try:
        if not Path(file).is_file():
            raise OSError("there is no such file")
        return open_picture(Path(file).read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(
            f"rewards.{name}: ref_image {file} cannot be read (looked in {Path.cwd()}): {error}"
        ) from error


def as_images(picture: Image.Image) -> Tensor:
    """(1, 3, H, W) in [0, 1]."""
    return pil_to_tensor(picture)[None] / 255
