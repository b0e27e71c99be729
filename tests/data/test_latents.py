"""The latent cache: what is encoded, what is read from disk, and what counts as another latent."""

from pathlib import Path

import pytest
import torch
from torch import nn, Tensor

from flowalign.data.latents import LatentCache
from flowalign.data.pictures import load_picture
from tests.data.image_files import encoded, halves, plain
from tests.tiny import make_policy


@pytest.fixture(scope="module")
def model():
    return make_policy().model


@pytest.fixture
def batch_sizes(model, monkeypatch) -> list[int]:
    """The numbers of images of the calls of the autoencoder so far."""
    calls, encode = [], model.encode_images

    def counted(images: Tensor) -> Tensor:
        calls.append(len(images))
        return encode(images)

    monkeypatch.setattr(model, "encode_images", counted)
    return calls


PICTURES = [encoded(halves((32, 32))), plain("green", (32, 32)), plain("white", (32, 32))]


def test_cached_latents_equal_encoded_ones(model, batch_sizes, tmp_path):
    fresh = LatentCache(model, 8, tmp_path)(PICTURES)
    images = torch.stack([load_picture(data, 64, 64) for data in PICTURES])
    assert torch.equal(fresh, model.encode_images(images))
    batch_sizes.clear()
    again = LatentCache(model, 8, tmp_path)(PICTURES[::-1])
    assert batch_sizes == []
    assert torch.equal(again, fresh.flip(0))
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(list(tmp_path.rglob("*.*"))) == 3


def test_missing_latents_are_encoded_in_passes(model, batch_sizes, tmp_path):
    latents = LatentCache(model, 2, tmp_path)
    latents(PICTURES[:1])
    assert batch_sizes == [1]
    latents([*PICTURES, plain("blue", (32, 32))])
    assert batch_sizes == [1, 2, 1]


def test_another_size_is_another_latent(batch_sizes, tmp_path, model):
    LatentCache(model, 8, tmp_path)(PICTURES[:1])
    other = make_policy(height=96, width=64).model
    assert LatentCache(other, 8, tmp_path)(PICTURES[:1]).shape == (1, 8, 12, 8)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_another_autoencoder_is_another_latent(model, tmp_path):
    before = LatentCache(model, 8, tmp_path)(PICTURES[:1])
    other = make_policy().model
    with torch.no_grad():
        next(m for m in other.vae.encoder.modules() if isinstance(m, nn.Conv2d)).bias.add_(0.1)
    after = LatentCache(other, 8, tmp_path)(PICTURES[:1])
    assert not torch.equal(before, after)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


@pytest.mark.parametrize("damage", [b"", b"not tensors", None])
def test_a_damaged_file_is_encoded_again(model, batch_sizes, tmp_path, damage):
    latents = LatentCache(model, 8, tmp_path)
    fresh = latents(PICTURES[:1])
    (file,) = tmp_path.rglob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-100] if damage is None else damage)
    assert torch.equal(latents(PICTURES[:1]), fresh)
    assert batch_sizes == [1, 1]
    assert file.read_bytes() == whole


def test_an_environment_variable_names_the_folder_also_without_a_home(model, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWALIGN_CACHE", str(tmp_path / "here"))
    monkeypatch.setattr(Path, "home", no_home)
    LatentCache(model, 8)(PICTURES[:1])
    assert len(list((tmp_path / "here" / "latents").rglob("*.safetensors"))) == 1


def no_home():
    raise RuntimeError("Could not determine home directory.")


def test_a_latent_decodes_to_its_image(model, tmp_path):
    (latent,) = LatentCache(model, 8, tmp_path)(PICTURES[2:])
    assert model.decode(latent[None]).mean() > 0.9
