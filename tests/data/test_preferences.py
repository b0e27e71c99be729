"""Pictures from disk: what is read, what is refused, and latents that are encoded once."""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from torch import nn, Tensor
from torch.testing import assert_close

from flowalign.config.load import load_config
from flowalign.data.latents import LatentCache
from flowalign.data.pictures import load_picture
from flowalign.data.preferences import Example, read_examples
from flowalign.errors import UserError
from flowalign.training.trainer import train
from tests.tiny import make_policy, ROOT

COLORS = {"a": "red", "b": "blue", "c": "green"}


def encoded(image: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def plain(color: Any, size: tuple[int, int] = (8, 8)) -> bytes:
    return encoded(Image.new("RGB", size, color))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with the pictures a, b and c; nothing is cached outside it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("FLOWALIGN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pictures").mkdir()
    for name, color in COLORS.items():
        (tmp_path / "pictures" / f"{name}.png").write_bytes(plain(color))
    return tmp_path / "pictures"


def written(folder: Path, *lines: Any, name: str = "pairs.jsonl") -> str:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / name).write_text(text)
    return str(folder / name)


def color_of(read: Any) -> str:
    found = Image.open(io.BytesIO(read())).convert("RGB").getpixel((4, 4))
    return min(
        ("red", "green", "blue"),
        key=lambda name: sum(abs(a - b) for a, b in zip(found, named(name), strict=True)),
    )


def named(color: str) -> tuple[int, ...]:
    return Image.new("RGB", (1, 1), color).getpixel((0, 0))


def colors(examples: list[Example]) -> list[tuple[str, str, str | None]]:
    return [
        (e.prompt.text, color_of(e.chosen), color_of(e.rejected) if e.rejected else None)
        for e in examples
    ]


def refusal(path: str | Path, paired: bool = True) -> str:
    with pytest.raises(UserError) as caught:
        read_examples(str(path), "data.pairs", paired)
    return str(caught.value)


# what is read


@pytest.mark.parametrize(
    ("better", "worse"), [("chosen", "rejected"), ("chosen_file_name", "rejected_file_name")]
)
def test_pairs_of_a_file_stand_beside_it(folder, better, worse):
    path = written(
        folder,
        {"prompt": "one", better: "a.png", worse: "b.png"},
        "",
        {"prompt": "two", better: "c.png", worse: "a.png"},
    )
    assert colors(read_examples(path, "data.pairs", paired=True)) == [
        ("one", "red", "blue"),
        ("two", "green", "red"),
    ]


def test_a_folder_is_read_by_its_metadata(folder):
    written(
        folder,
        {"prompt": "one", "file_name": "a.png"},
        {"prompt": "two", "image": "b.png"},
        name="metadata.jsonl",
    )
    assert colors(read_examples(str(folder), "data.pairs", paired=False)) == [
        ("one", "red", None),
        ("two", "blue", None),
    ]


def test_the_gap_is_the_difference_of_scores_and_1_without_them(folder):
    pair = {"prompt": "one", "chosen": "a.png", "rejected": "b.png"}
    path = written(folder, pair, {**pair, "score_chosen": 0.75, "score_rejected": 0.25})
    assert [example.gap for example in read_examples(path, "data.pairs", paired=True)] == [1.0, 0.5]


def test_pairs_of_equal_scores_are_ties_and_left_out_but_serve_as_pictures(folder):
    pair = {"prompt": "one", "chosen": "a.png", "rejected": "b.png"}
    path = written(
        folder, {**pair, "score_chosen": 0.5, "score_rejected": 0.5}, {**pair, "prompt": "two"}
    )
    assert [example.prompt.text for example in read_examples(path, "data.pairs", paired=True)] == [
        "two"
    ]
    assert [example.prompt.text for example in read_examples(path, "data.pairs", paired=False)] == [
        "one",
        "two",
    ]


ROWS = {
    "caption": ["one", "two", "tie", "unlabelled"],
    "jpg_0": ["a", "b", "a", "a"],
    "jpg_1": ["b", "c", "b", "b"],
    "label_0": [1.0, 0.0, 0.5, None],
}


def pick_a_pic(folder: Path, as_images: bool = False, **changes: Any) -> datasets.Dataset:
    rows = {name: values for name, values in {**ROWS, **changes}.items() if values}
    for side in ("jpg_0", "jpg_1"):
        if side in rows:
            rows[side] = [(folder / f"{name}.png").read_bytes() for name in rows[side]]
    table = datasets.Dataset.from_dict(rows)
    if as_images:
        for side in ("jpg_0", "jpg_1"):
            table = table.cast_column(side, datasets.Image())
    return table


@pytest.mark.parametrize("as_images", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "folder of parquet", "saved"])
def test_pick_a_pic_s_columns_become_pairs_without_ties(folder, kind, as_images):
    table, place = pick_a_pic(folder, as_images), folder / "data"
    if kind == "saved":
        table.save_to_disk(place)
    else:
        place.mkdir()
        table.to_parquet(place / "train.parquet")
        place = place / "train.parquet" if kind == "parquet" else place
    assert colors(read_examples(str(place), "data.pairs", paired=True)) == [
        ("one", "red", "blue"),
        ("two", "green", "blue"),
    ]


def test_of_pairs_the_better_pictures_serve_where_single_ones_do(folder):
    path = written(
        folder,
        {"prompt": "one", "chosen": "a.png", "rejected": "b.png"},
        {"prompt": "two", "image": "c.png"},
    )
    assert [
        color_of(example.chosen) for example in read_examples(path, "data.pairs", paired=False)
    ] == ["red", "green"]


# what is refused

PAIR = {"prompt": "one", "chosen": "a.png", "rejected": "b.png"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"chosen": "a.png", "rejected": "b.png"}, 'line 2: write {"prompt"'),
        ({"prompt": 3, "chosen": "a.png", "rejected": "b.png"}, 'line 2: write {"prompt"'),
        ({"prompt": "one", "rejected": "b.png"}, 'line 2: write {"prompt"'),
        ([1, 2], 'line 2: write {"prompt"'),
        ({**PAIR, "rejected": "nowhere.png"}, "line 2: there is no picture"),
        ({**PAIR, "chosen": "nowhere.png"}, "line 2: there is no picture"),
        ("{", "line 2 is not JSON"),
    ],
)
def test_a_line_that_is_no_pair_is_refused_by_file_and_line(folder, line, message):
    path = written(folder, PAIR, line)
    assert f"data.pairs: {path}, {message}" in refusal(path)


@pytest.mark.parametrize(
    "scores", [{"score_chosen": "high", "score_rejected": 0.1}, {"score_chosen": None}]
)
def test_a_score_that_is_no_number_is_refused_by_file_and_line(folder, scores):
    path = written(folder, PAIR, {**PAIR, **scores})
    assert "line 2" in refusal(path)


def test_a_single_picture_is_refused_where_pairs_are_wanted(folder):
    path = written(folder, PAIR, {"prompt": "two", "image": "a.png"})
    assert (
        refusal(path)
        == f"data.pairs: {path}, entry 2 has one picture only; the objective learns from pairs."
    )


def test_what_is_not_there_is_named(folder):
    assert (
        refusal(folder / "nowhere") == f"data.pairs: there is no file or folder {folder}/nowhere."
    )


def test_an_empty_file_is_refused(folder):
    assert "has no pairs" in refusal(written(folder, ""))


def test_missing_columns_are_named_with_those_there_are(folder):
    pick_a_pic(folder, label_0=None, jpg_1=None).to_parquet(folder / "train.parquet")
    message = refusal(folder / "train.parquet")
    assert "has no column jpg_1, label_0; it has caption, jpg_0" in message


def test_nothing_but_ties_is_refused(folder):
    pick_a_pic(folder, label_0=[0.5] * 4).to_parquet(folder / "train.parquet")
    assert "ties are left out" in refusal(folder / "train.parquet")


@pytest.mark.parametrize("name", ["notes.txt", "empty folder", "splits"])
def test_what_is_no_dataset_is_refused_with_what_is_one(folder, name):
    place = folder / name
    if name == "notes.txt":
        place.write_text("hello")
    elif name == "empty folder":
        place.mkdir()
    else:
        datasets.DatasetDict({"train": pick_a_pic(folder)}).save_to_disk(place)
    message = refusal(place)
    assert (
        f"data.pairs: {place} is not a .jsonl file, a folder with metadata.jsonl, parquet files"
        in message
    )


# pictures


def corners(picture: Tensor) -> list[tuple[int, ...]]:
    """Colours of the four corners, as full or empty channels."""
    return [
        tuple(picture[:, y, x].round().int().tolist())
        for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1))
    ]


RED, GREEN, BLUE, WHITE = (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)


def halves(size: tuple[int, int]) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, "red")
    image.paste("blue", (size[0] // 2, 0, *size))
    return image


def test_a_picture_is_scaled_to_the_size():
    picture = load_picture(encoded(halves((8, 8))), height=32, width=16)
    assert picture.shape == (3, 32, 16)
    assert (picture.dtype, picture.min().item() >= 0, picture.max().item() <= 1) == (
        torch.float32,
        True,
        True,
    )
    assert corners(picture) == [RED, BLUE, RED, BLUE]


def test_a_picture_is_turned_as_its_camera_says():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter clockwise
    picture = load_picture(encoded(halves((32, 32)), "JPEG", exif=exif, quality=95), 32, 32)
    assert corners(picture) == [RED, RED, BLUE, BLUE]


def test_what_is_transparent_becomes_white():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (4, 0, 8, 8))
    assert corners(load_picture(encoded(image), 8, 8)) == [RED, WHITE, RED, WHITE]
    half = load_picture(encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 128))), 8, 8)
    assert_close(half[:, 4, 4], torch.tensor([1.0, 0.5, 0.5]), atol=0.01, rtol=0)


def test_the_middle_of_a_picture_stays():
    image = Image.new("RGB", (24, 8), "green")
    image.paste("red", (8, 0, 16, 8))
    assert load_picture(encoded(image), 8, 8)[:, 1:-1, 1:-1].round().flatten(1).unique(
        dim=1
    ).flatten().tolist() == [1, 0, 0]


@pytest.mark.parametrize("mode", ["L", "P", "LA", "CMYK", "1"])
def test_a_picture_of_any_mode_is_red_green_and_blue(mode):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    picture = load_picture(encoded(Image.new("RGB", (8, 8), "white").convert(mode), kind), 8, 8)
    assert picture.shape == (3, 8, 8)
    assert picture.min() > 0.99


@pytest.mark.parametrize("data", [b"", b"hello", plain("red")[:20]])
def test_bytes_that_are_no_picture_are_refused(data):
    with pytest.raises(UserError, match="no picture"):
        load_picture(data, 8, 8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_picture_that_breaks_off_is_refused(kind):
    data = encoded(Image.effect_noise((64, 64), 50).convert("RGB"), kind)
    with pytest.raises(UserError, match="no picture"):
        load_picture(data[: len(data) // 2], 8, 8)


# latents


@pytest.fixture(scope="module")
def model():
    return make_policy().model


@pytest.fixture
def asked(model, monkeypatch) -> list[int]:
    """How many pictures were encoded at each call."""
    calls, encode = [], model.encode_images

    def counted(images: Tensor) -> Tensor:
        calls.append(len(images))
        return encode(images)

    monkeypatch.setattr(model, "encode_images", counted)
    return calls


PICTURES = [encoded(halves((32, 32))), plain("green", (32, 32)), plain("white", (32, 32))]


def test_latents_from_the_disk_are_those_that_were_encoded(model, asked, tmp_path):
    fresh = LatentCache(model, 8, tmp_path)(PICTURES)
    images = torch.stack([load_picture(data, 64, 64) for data in PICTURES])
    assert torch.equal(fresh, model.encode_images(images))
    asked.clear()
    again = LatentCache(model, 8, tmp_path)(PICTURES[::-1])
    assert asked == []
    assert torch.equal(again, fresh.flip(0))
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(list(tmp_path.rglob("*.*"))) == 3


def test_only_what_is_missing_is_encoded_in_passes(model, asked, tmp_path):
    latents = LatentCache(model, 2, tmp_path)
    latents(PICTURES[:1])
    assert asked == [1]
    latents([*PICTURES, plain("blue", (32, 32))])
    assert asked == [1, 2, 1]


def test_another_size_is_another_latent(asked, tmp_path, model):
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


@pytest.mark.parametrize("role", ["chosen", "rejected"])
def test_a_file_that_is_no_picture_is_named_when_it_is_met(role, folder, tmp_path):
    (folder / "b.png").write_bytes(b"no picture")
    pair = {"prompt": "a red circle", "chosen": "a.png", "rejected": "c.png"}
    path = written(folder, pair, {**pair, role: "b.png"})
    overrides = [
        f"data.pairs={path}",
        f"evaluation.pairs={path}",
        "train.prompts_per_step=2",
        "train.images_per_pass=2",
    ]
    config = load_config(
        ROOT / "configs" / "tiny" / "dpo.yaml", [*overrides, f"output={tmp_path}/run"]
    )
    with pytest.raises(
        UserError,
        match=rf"^(data|evaluation)\.pairs: {path}, line 2 holds something that is no picture",
    ):
        train(config)


@pytest.mark.parametrize("damage", [b"", b"not tensors", None])
def test_a_damaged_latent_is_made_again(model, asked, tmp_path, damage):
    latents = LatentCache(model, 8, tmp_path)
    fresh = latents(PICTURES[:1])
    (file,) = tmp_path.rglob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-100] if damage is None else damage)
    assert torch.equal(latents(PICTURES[:1]), fresh)
    assert asked == [1, 1]
    assert file.read_bytes() == whole


def test_latents_lie_where_the_environment_says(model, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWALIGN_CACHE", str(tmp_path / "here"))
    LatentCache(model, 8)(PICTURES[:1])
    assert len(list((tmp_path / "here" / "latents").rglob("*.safetensors"))) == 1


def test_a_latent_decodes_to_its_picture(model, tmp_path):
    (latent,) = LatentCache(model, 8, tmp_path)(PICTURES[2:])
    assert model.decode(latent[None]).mean() > 0.9
