"""Encode images with the model's autoencoder once, and cache their latents on disk."""

from collections.abc import Sequence
from pathlib import Path

import torch

from flowalign.data.pictures import load_picture
from flowalign.disk_cache import DiskCache
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
        self.model = model
        size = f"{model.config.height}x{model.config.width}"
        self.cache = DiskCache("latents", f"{model.latent_fingerprint()}/{size}", folder)

    def __call__(self, images: Sequence[bytes], names: Sequence[str] = ()) -> Latent:
        """Return the latents (B, *latent) of image files, on the model's device.

        `names` are what an error calls the images. Raises UserError if one cannot be decoded, or
        if the cache cannot be written.
        """
        names = names or ["data.pairs"] * len(images)
        latents = [self._latent(data, name) for data, name in zip(images, names, strict=True)]
        return torch.stack(latents).to(self.model.device)

    def _latent(self, data: bytes, name: str) -> Latent:
        found = self.cache.read(data)
        if found and "x0" in found:
            return found["x0"]
        height, width = self.model.config.height, self.model.config.width
        pixels = load_picture(data, height, width, name)
        # Each picture alone: in a batch it would be rounded in another way. Which pictures are
        # missing depends on where a run was stopped, and its result must not.
        latent = self.model.encode_images(pixels[None]).cpu()[0]
        self.cache.write(data, {"x0": latent})
        return latent
