"""Image files that rewards compare with: whole folders, or the one in a prompt's `ref_image`."""

import os
from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from flowalign.data.pictures import open_picture
from flowalign.data.prompts import Metadata
from flowalign.errors import RunError, UserError

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def picture_files(pictures: object, key: str) -> list[Path]:
    """Return the image files of a folder and its subfolders, sorted, or those of a list.

    Raises UserError if a path does not exist or there are no images.
    """
    names = [pictures] if isinstance(pictures, str) else pictures
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{key} is {pictures!r}. Write a folder, or a list of image files.")
    files: list[Path] = []
    for path in (Path(name).expanduser() for name in names):
        if not path.exists():
            raise UserError(f"{key}: there is no file or folder {path}. Correct the path.")
        files += _images_in(path) if path.is_dir() else [path]
    if not files:
        raise UserError(
            f"{key}: {pictures} has no images. Use files that end in {', '.join(sorted(SUFFIXES))}."
        )
    return files


def _images_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)


def read_picture(file: Path, key: str) -> Image.Image:
    """Open an image file as RGB. Raises UserError if it is not an image."""
    try:
        return open_picture(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{key}: {file} cannot be opened as an image: {error}. Replace or remove it."
        ) from error


def reference_file(name: str, prompt: str, entry: Metadata) -> str | None:
    """Return the reference image of a prompt, or None if its images are not to be scored.

    Raises RunError if the prompt has no field `ref_image`: leaving it out is taken for a mistake.
    """
    if "ref_image" not in entry:
        raise RunError(
            f"rewards.{name}: the prompt {prompt!r} has no field 'ref_image'. Write it in a .jsonl "
            'file as {"prompt": "...", "ref_image": "picture.png"}, or with null to leave its '
            "images unscored."
        )
    return entry["ref_image"] or None


def reference_path(file: str) -> Path:
    """Return where a reference image lies. `~` is expanded, as in every path of a run."""
    return Path(os.path.expanduser(file))


def read_reference(name: str, file: str) -> Image.Image:
    """Open a prompt's reference image. Raises RunError if it is missing or not an image."""
    try:
        return open_picture(reference_path(file).read_bytes())
    except FileNotFoundError:
        raise RunError(
            f"rewards.{name}: ref_image {file} does not exist (looked in {Path.cwd()}). "
            "Correct the path in the prompt file."
        ) from None
    except (OSError, ValueError) as error:
        raise RunError(
            f"rewards.{name}: ref_image {file} cannot be opened as an image: {error}. Replace it."
        ) from error


def as_images(picture: Image.Image) -> Tensor:
    """Convert a PIL image to (1, 3, H, W) in [0, 1]."""
    return pil_to_tensor(picture)[None] / 255
