"""The latent cache: what is encoded, what is read from disk, and what counts as another latent."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn, Tensor

from flowalign.data.latents import LatentCache
from flowalign.data.pictures import load_picture
from flowalign.errors import UserError
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
    fresh = LatentCache(model, tmp_path)(PICTURES)
    images = torch.stack([load_picture(data, 64, 64) for data in PICTURES])
    assert torch.equal(fresh, torch.cat([model.encode_images(image[None]) for image in images]))
    batch_sizes.clear()
    again = LatentCache(model, tmp_path)(PICTURES[::-1])
    assert batch_sizes == []
    assert torch.equal(again, fresh.flip(0))
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(list(tmp_path.rglob("*.*"))) == 3


def test_a_latent_does_not_depend_on_the_pictures_beside_it(model, tmp_path):
    """Which pictures are missing in the cache depends on where a run was stopped."""
    pictures = [encoded(halves((32, 8 + 3 * i))) for i in range(7)]
    together = LatentCache(model, tmp_path / "one")(pictures)
    parts = LatentCache(model, tmp_path / "two")
    for start, stop in ((3, 4), (0, 2), (1, 7)):
        assert torch.equal(parts(pictures[start:stop]), together[start:stop])


def test_a_picture_that_occurs_twice_is_encoded_once(model, batch_sizes, tmp_path):
    latents = LatentCache(model, tmp_path)([PICTURES[0], PICTURES[1], PICTURES[0]])
    assert batch_sizes == [1, 1]
    assert torch.equal(latents[0], latents[2])


def test_another_size_is_another_latent(batch_sizes, tmp_path, model):
    LatentCache(model, tmp_path)(PICTURES[:1])
    other = make_policy(height=96, width=64).model
    assert LatentCache(other, tmp_path)(PICTURES[:1]).shape == (1, 8, 12, 8)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_another_autoencoder_is_another_latent(model, tmp_path):
    before = LatentCache(model, tmp_path)(PICTURES[:1])
    other = make_policy().model
    with torch.no_grad():
        next(m for m in other.vae.encoder.modules() if isinstance(m, nn.Conv2d)).bias.add_(0.1)
    after = LatentCache(other, tmp_path)(PICTURES[:1])
    assert not torch.equal(before, after)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def change_a_value(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))


def write_without_checksum(file: Path) -> None:
    save_file({"x0": load_file(file)["x0"] + 1}, file)


def write_another_name(file: Path) -> None:
    save_file({"x1": load_file(file)["x0"]}, file)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"not tensors"),
        cut,
        change_a_value,
        write_without_checksum,
        write_another_name,
    ],
)
def test_a_damaged_file_is_encoded_again(model, batch_sizes, tmp_path, damage):
    latents = LatentCache(model, tmp_path)
    fresh = latents(PICTURES[:1])
    (file,) = tmp_path.rglob("*.safetensors")
    whole = file.read_bytes()
    damage(file)
    assert torch.equal(latents(PICTURES[:1]), fresh)
    assert batch_sizes == [1, 1]
    assert file.read_bytes() == whole


def test_an_environment_variable_names_the_folder_also_without_a_home(model, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWALIGN_CACHE", str(tmp_path / "here"))
    monkeypatch.setattr(Path, "home", no_home)
    LatentCache(model)(PICTURES[:1])
    assert len(list((tmp_path / "here" / "latents").rglob("*.safetensors"))) == 1


def no_home():
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("folder", ["taken/cache", "/proc/cache", "/dev/null/cache"])
def test_a_cache_that_cannot_be_made_is_an_error_that_names_the_variable(
    model, folder, tmp_path, monkeypatch
):
    (tmp_path / "taken").write_text("a file, not a folder")
    monkeypatch.setenv("FLOWALIGN_CACHE", str(tmp_path / folder))
    with pytest.raises(UserError) as caught:
        LatentCache(model)
    assert str(caught.value).startswith(f"The cache {tmp_path / folder}/latents cannot be written")
    assert "Set the environment variable FLOWALIGN_CACHE to a folder" in str(caught.value)


def test_a_cache_without_a_home_is_an_error_that_names_the_variable(model, monkeypatch):
    monkeypatch.delenv("FLOWALIGN_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(UserError, match=r"^The cache ~/\.cache/flowalign cannot be found.* Set"):
        LatentCache(model)


def test_a_cache_that_fills_the_disk_is_an_error_that_names_the_variable(model, tmp_path):
    latents = LatentCache(model, tmp_path / "cache")
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(UserError, match=r"cannot be written.*FLOWALIGN_CACHE"):
        latents(PICTURES[:1])


def test_a_latent_decodes_to_its_image(model, tmp_path):
    (latent,) = LatentCache(model, tmp_path)(PICTURES[2:])
    assert model.decode(latent[None]).mean() > 0.9
