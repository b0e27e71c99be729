"""Encode images with the model's autoencoder once, and cache their latents on disk."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flowalign.data.pictures import load_picture
from flowalign.flow import Latent
from flowalign.models.base import FlowModel


class LatentCache:
    """Encodes images and caches their latents by image bytes, size and autoencoder.

    The files lie in `folder`, by default `latents/` below `$FLOWALIGN_CACHE` or
    `~/.cache/flowalign`. Several processes may share it.
    """

    def __init__(self, model: FlowModel, images_per_pass: int, folder: Path | None = None):
        self.model, self.images_per_pass = model, images_per_pass
        # A user of a cluster may have no home folder, and then sets the variable.
        cache = os.environ.get("FLOWALIGN_CACHE", "~/.cache/flowalign")
        self.folder = folder or Path(cache).expanduser() / "latents"
        size = f"{model.config.height}x{model.config.width}"
        self.salt = f"{model.latent_fingerprint()}/{size}".encode()

    def __call__(self, images: Sequence[bytes], names: Sequence[str] = ()) -> Latent:
        """Return the latents (B, *latent) of image files, on the model's device.

        `names` are what an error calls the images. Raises UserError if one cannot be decoded.
        """
        names = names or ["data.pairs"] * len(images)
        files = [self._file(data) for data in images]
        latents = {file: self._read(file) for file in set(files)}
        missing = [i for i, file in enumerate(files) if latents[file] is None]
        for start in range(0, len(missing), self.images_per_pass):
            part = missing[start : start + self.images_per_pass]
            encoded = self._encode([images[i] for i in part], [names[i] for i in part])
            for i, latent in zip(part, encoded, strict=True):
                latents[files[i]] = latent
                self._write(files[i], latent)
        rows = [latents[file] for file in files]
        return torch.stack([row for row in rows if row is not None]).to(self.model.device)

    def _encode(self, images: Sequence[bytes], names: Sequence[str]) -> Latent:
        height, width = self.model.config.height, self.model.config.width
        pairs = zip(images, names, strict=True)
        pixels = torch.stack([load_picture(data, height, width, name) for data, name in pairs])
        return self.model.encode_images(pixels).cpu()

    def _file(self, data: bytes) -> Path:
        name = hashlib.blake2b(self.salt + data, digest_size=16).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    @staticmethod
    def _read(file: Path) -> Latent | None:
        try:
            return load_file(file)["x0"]
        except (FileNotFoundError, SafetensorError, KeyError):
            return None  # encoded again, which also replaces a damaged file

    @staticmethod
    def _write(file: Path, latent: Latent) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Renaming is atomic, and the process id keeps processes that encode one image apart.
        part = file.with_suffix(f".{os.getpid()}.part")
        save_file({"x0": latent.contiguous()}, part)
        part.replace(file)
