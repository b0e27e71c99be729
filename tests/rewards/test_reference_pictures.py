"""Image files that rewards compare with: folders, lists, and the reference of a prompt."""

import pytest
import torch
from PIL import Image

from flowalign.errors import RunError, UserError
from flowalign.rewards.reference_pictures import (
    as_images,
    picture_files,
    read_picture,
    read_reference,
    reference_file,
)


def test_images_are_listed_from_folders_and_lists(tmp_path, monkeypatch):
    (tmp_path / "more").mkdir()
    for name in ("b.png", "a.JPG", "more/c.webp"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("text")
    assert [file.name for file in picture_files(str(tmp_path), "key")] == [
        "a.JPG",
        "b.png",
        "c.webp",
    ]
    assert picture_files([str(tmp_path / "b.png")], "key") == [tmp_path / "b.png"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert picture_files("~/more", "key") == [tmp_path / "more" / "c.webp"]


def test_images_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(UserError, match="key: there is no file or folder"):
        picture_files(str(tmp_path / "none"), "key")
    with pytest.raises(UserError, match=r"key: .* has no images\. Use files that end in \.bmp"):
        picture_files(str(tmp_path), "key")
    with pytest.raises(UserError, match="Write a folder, or a list of image files"):
        picture_files(3, "key")
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(UserError, match=r"key: .*a\.png cannot be opened as an image"):
        read_picture(tmp_path / "a.png", "key")


def test_a_reference_is_rotated_by_its_exif_tag_and_laid_on_white(tmp_path):
    turned, clear = Image.new("RGB", (8, 4), "red"), Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    clear.save(tmp_path / "clear.png")
    assert read_reference("mine", str(tmp_path / "turned.png")).size == (4, 8)
    assert torch.equal(
        as_images(read_reference("mine", str(tmp_path / "clear.png"))), torch.ones(1, 3, 2, 2)
    )


def test_a_prompt_names_its_reference_or_null():
    assert reference_file("mine", "a circle", {"ref_image": "a.png"}) == "a.png"
    assert reference_file("mine", "a circle", {"ref_image": None}) is None
    with pytest.raises(
        RunError,
        match=r"rewards\.mine: the prompt 'a circle' has no field 'ref_image'.*\"picture\.png\"",
    ):
        reference_file("mine", "a circle", {})
    with pytest.raises(
        RunError, match=r"rewards\.mine: ref_image nowhere\.png does not exist \(looked in "
    ):
        read_reference("mine", "nowhere.png")


def test_a_reference_that_is_not_an_image_is_named(tmp_path):
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(RunError, match=r"rewards\.mine: ref_image .*a\.png cannot be opened as an"):
        read_reference("mine", str(tmp_path / "a.png"))


def test_the_home_folder_is_expanded_in_the_path_of_a_reference(tmp_path, monkeypatch):
    Image.new("RGB", (8, 4), "red").save(tmp_path / "a.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_reference("mine", "~/a.png").size == (8, 4)
