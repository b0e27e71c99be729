"""Latents of pictures, encoded once and kept on disk."""

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
    """Latents of pictures, kept on disk under a hash of picture, size and autoencoder, so that each is encoded once."""

    def __init__(self, model: FlowModel, images_per_pass: int, folder: Path | None = None):
        self.model, self.images_per_pass = model, images_per_pass
        cache = os.environ.get("FLOWALIGN_CACHE", Path.home() / ".cache" / "flowalign")
        self.folder = folder or Path(cache) / "latents"
        weights = hashlib.blake2b(digest_size=16)
        for parameter in model.vae.parameters():
            weights.update(parameter.detach().float().cpu().numpy().tobytes())
        config, size = model.vae.config, f"{model.config.height}x{model.config.width}"
        self.salt = (
            f"{weights.hexdigest()}/{config.scaling_factor}/{config.shift_factor}/{size}".encode()
        )

    def __call__(self, pictures: Sequence[bytes], names: Sequence[str] = ()) -> Latent:
        """(B, *latent), on the model's device. UserError with the name of what is no picture."""
        names = names or ["data.pairs"] * len(pictures)
        files = [self._file(data) for data in pictures]
        found = {file: latent for file in set(files) if (latent := self._read(file)) is not None}
        missing = [i for i, file in enumerate(files) if file not in found]
        for start in range(0, len(missing), self.images_per_pass):
            chosen = missing[start : start + self.images_per_pass]
            config = self.model.config
            images = torch.stack(
                [load_picture(pictures[i], config.height, config.width, names[i]) for i in chosen]
            )
            for i, latent in zip(chosen, self.model.encode_images(images).cpu(), strict=True):
                found[files[i]] = latent
                self._write(files[i], latent)
        return torch.stack([found[file] for file in files]).to(self.model.device)

    def _file(self, data: bytes) -> Path:
        name = hashlib.blake2b(self.salt + data, digest_size=16).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    @staticmethod
    def _read(file: Path) -> Latent | None:
        try:
            return load_file(file)["x0"]
        except (FileNotFoundError, SafetensorError, KeyError):
            return None

    @staticmethod
    def _write(file: Path, latent: Latent) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(f".{os.getpid()}.part")
        save_file({"x0": latent.contiguous()}, beside)
        beside.rename(file)
