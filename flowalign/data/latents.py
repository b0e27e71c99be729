"""Encode images with the model's autoencoder once, and cache their latents on disk."""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from flowalign.data.pictures import load_picture
from flowalign.errors import UserError
from flowalign.files import ANOTHER_CACHE, cache_folder, read_with_checksum, with_checksum
from flowalign.flow import Latent
from flowalign.models.base import FlowModel


class LatentCache:
    """Encodes images and caches their latents by image bytes, size and autoencoder.

    The files lie in `folder`, by default `latents/` below `$FLOWALIGN_CACHE` or
    `~/.cache/flowalign`. Several processes may share it. Each holds a checksum.

    Raises:
        UserError: The folder cannot be made or written.
    """

    def __init__(self, model: FlowModel, folder: Path | None = None):
        self.model, self.folder = model, folder or cache_folder() / "latents"
        require_writable(self.folder)
        size = f"{model.config.height}x{model.config.width}"
        self.salt = f"{model.latent_fingerprint()}/{size}".encode()

    def __call__(self, images: Sequence[bytes], names: Sequence[str] = ()) -> Latent:
        """Return the latents (B, *latent) of image files, on the model's device.

        `names` are what an error calls the images. Raises UserError if one cannot be decoded, or
        if the cache cannot be written.
        """
        names = names or ["data.pairs"] * len(images)
        latents = [self._latent(data, name) for data, name in zip(images, names, strict=True)]
        return torch.stack(latents).to(self.model.device)

    def _latent(self, data: bytes, name: str) -> Latent:
        file = self._file(data)
        latent = self._read(file)
        if latent is None:
            height, width = self.model.config.height, self.model.config.width
            pixels = load_picture(data, height, width, name)
            # Each picture alone: in a batch it would be rounded in another way. Which pictures are
            # missing depends on where a run was stopped, and its result must not.
            latent = self.model.encode_images(pixels[None]).cpu()[0]
            self._write(file, latent)
        return latent

    def _file(self, data: bytes) -> Path:
        name = hashlib.blake2b(self.salt + data, digest_size=16).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    @staticmethod
    def _read(file: Path) -> Latent | None:
        try:
            return read_with_checksum(file).get("x0")
        except UserError:
            return None  # encoded again, which also replaces a damaged file

    def _write(self, file: Path, latent: Latent) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # Renaming is atomic, and the process id keeps processes that encode one image apart.
            part = file.with_suffix(f".{os.getpid()}.part")
            part.write_bytes(with_checksum({"x0": latent}))
            part.replace(file)
        except OSError as error:
            raise _not_writable(self.folder, error) from error


def require_writable(folder: Path) -> None:
    """Make a folder. Raises UserError if it cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _not_writable(folder, error) from error


def _not_writable(folder: Path, error: OSError) -> UserError:
    return UserError(f"The cache {folder} cannot be written: {error}. {ANOTHER_CACHE}")
