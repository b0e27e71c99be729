"""`flowalign reward test` and `list`: what is said of a good reward and of bad ones, and about which pictures."""

import json
from pathlib import Path

import pytest
from PIL import Image

from flowalign.cli import main
from flowalign.probe import bundled_samples, samples_from
from flowalign.rewards import REWARDS
from tests.tiny import ROOT

NOTHING_WRONG = "Nothing wrong was found."


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    "spec", ["brightness", "jpeg_size", "{jpeg_size: {quality: 50}}", "sharpness", "scene_match", "clip_score", "vendi"]
)
def test_nothing_is_wrong_with_a_bundled_reward(spec, capsys):
    assert main(["reward", "test", spec]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == NOTHING_WRONG
    assert not [line for line in lines if line.startswith("!")]
    subjects = ["scores", "spread", "determinism", *(["batch size"] if spec != "vendi" else []), "speed", "gradient"]
    assert [line.strip().partition(":")[0] for line in lines[9:-1]] == subjects
    assert len(lines) < 20


def test_the_screen_says_what_the_reward_is_and_what_every_picture_gets(capsys):
    main(["reward", "test", "brightness"])
    lines = capsys.readouterr().out.splitlines()
    samples = bundled_samples()
    assert lines[0] == "brightness: pointwise, of tensors"
    for line, image, prompt in zip(lines[1:9], samples.images, samples.prompts, strict=True):
        assert line.split(maxsplit=1) == [f"{image.mean():.4f}", prompt.text]
    assert "8 numbers, one an image, declared to lie in [0, 1]" in lines[9]
    assert "reaches 8 of 8 pictures" in lines[-2]


REWARDS_OF_MINE = """
import torch
from flowalign.rewards.base import traits


def constant(images, prompts, metadata):
    return [1.0] * len(images)


def random(images, prompts, metadata):
    return torch.rand(len(images))


def of_the_batch(images, prompts, metadata):
    brightness = images.mean((1, 2, 3))
    return brightness - brightness.mean()


def never(images, prompts, metadata):
    return [None] * len(images)


def sometimes(images, prompts, metadata):
    return [image.mean().item() if image.mean() > 0.85 else None for image in images]


def raises(images, prompts, metadata):
    raise OSError("no weights")


def wrong_shape(images, prompts, metadata):
    return images.mean((2, 3))


def of_arrays(images, prompts, metadata):
    return images.mean((1, 2, 3)).numpy()


def of_endless_slope(images, prompts, metadata):
    return images.mean((1, 2, 3)) + (images - images.detach()).sum((1, 2, 3)).abs().sqrt()


def by_a_field(images, prompts, metadata):
    return [entry["wanted"] for entry in metadata]


@traits(level="group")
def of_one_prompt(images, prompts, metadata):
    assert len(set(prompts)) == 1
    return images.mean((1, 2, 3)) * len(images)
"""


@pytest.fixture
def mine(tmp_path) -> str:
    (tmp_path / "mine.py").write_text(REWARDS_OF_MINE)
    return f"{tmp_path}/mine.py:"


@pytest.mark.parametrize(
    ("name", "finding", "look_at"),
    [
        ("constant", "! spread:      constant: every picture gets 1, so nothing can be learned from it", "spread"),
        ("random", "! determinism: asked twice, scores differ by up to", "determinism, batch size"),
        ("of_the_batch", "! batch size:  one by one, scores differ by up to", "batch size"),
        ("never", "! spread:      no picture was scored; give pictures it is made for with --images", "spread"),
        ("of_endless_slope", "! gradient:    does not reach the pictures, or is not finite", "gradient"),
    ],
)
def test_what_is_wrong_with_a_reward_is_named(name, finding, look_at, mine, capsys):
    assert main(["reward", "test", mine + name]) == 1
    output = capsys.readouterr().out
    assert finding in output
    assert output.endswith(f"Look at: {look_at}.\n")


@pytest.mark.parametrize(
    ("name", "message"),
    [("raises", "rewards.raises raised OSError: no weights ("), ("wrong_shape", "rewards.wrong_shape returned shape (8, 3)")],
)
def test_a_reward_that_gives_no_scores_ends_with_one_message(name, message, mine, capsys):
    assert main(["reward", "test", mine + name]) == 1
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize(
    ("name", "finding"),
    [
        ("of_arrays", "gradient:    none; objectives that backpropagate through the reward cannot use it"),
        ("sometimes", "not scored"),
        ("of_one_prompt", "gradient:    reaches 8 of 8 pictures"),
    ],
)
def test_what_is_merely_so_is_not_wrong(name, finding, mine, capsys):
    assert main(["reward", "test", mine + name]) == 0
    assert finding in capsys.readouterr().out


# pictures of one's own


@pytest.fixture
def folder(tmp_path) -> Path:
    place = tmp_path / "pictures"
    place.mkdir()
    for level, name in ((50, "a_red_circle.png"), (150, "blue square.jpg"), (250, "three.webp")):
        Image.new("RGB", (40, 30), (level, level, level)).save(place / name)
    (place / "notes.txt").write_text("not a picture")
    return place


def describe(folder: Path, *entries: dict) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries))


def test_pictures_without_metadata_are_named_by_their_prompts(folder, capsys):
    assert main(["reward", "test", "brightness", "--images", str(folder)]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:4]]
    assert [prompt for _, prompt in lines] == ["a red circle", "blue square", "three"]
    assert [float(score) for score, _ in lines] == pytest.approx([50 / 255, 150 / 255, 250 / 255], abs=0.01)


def test_metadata_gives_pictures_their_prompts_and_fields(folder, mine, capsys):
    describe(
        folder,
        {"file_name": "three.webp", "prompt": "a white wall", "wanted": 3.5},
        {"file_name": "a_red_circle.png", "prompt": "night", "wanted": -1},
    )
    assert main(["reward", "test", f"{mine}by_a_field", "--images", str(folder)]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:3]]
    assert lines == [["3.5000", "a white wall"], ["-1.0000", "night"]]
    assert [prompt.metadata for prompt in samples_from(str(folder)).prompts] == [{"wanted": 3.5}, {"wanted": -1}]


def test_rewards_of_groups_are_asked_about_one_prompt_at_a_time(folder, mine, capsys):
    names = ["a_red_circle.png", "blue square.jpg", "three.webp"]
    describe(folder, *({"file_name": name, "prompt": prompt} for name, prompt in zip(names, ("x", "y", "x"), strict=True)))
    assert main(["reward", "test", f"{mine}of_one_prompt", "--images", str(folder)]) == 0
    scores = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()[1:4]]
    assert scores == pytest.approx([2 * 50 / 255, 150 / 255, 2 * 250 / 255], abs=0.01)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"file_name": "four.png", "prompt": "x"}], "--images: there is no picture"),
        ([{"prompt": "x"}], 'metadata.jsonl, line 1 has no "file_name"; write for example'),
        ([{"file_name": "notes.txt", "prompt": "x"}], "notes.txt is no picture"),
    ],
)
def test_metadata_that_does_not_fit_the_folder_is_answered(entries, message, folder, capsys):
    describe(folder, *entries)
    assert main(["reward", "test", "brightness", "--images", str(folder)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["brightness", "--images", "nowhere"], "--images: there is no folder nowhere"),
        (["brightness", "--images", "configs"], "--images: configs has no pictures (.png, .jpg"),
        (["brightnes"], "Did you mean 'brightness'"),
        (["{brightness: 1, jpeg_size: 1}"], "names 2 rewards; write one"),
        (["{brightness: "], "'{brightness: ' is not YAML"),
        (["{jpeg_size: {qualty: 3}}"], "Did you mean 'quality'"),
        (["nowhere.py:mine"], "there is no file nowhere.py"),
        (["http://127.0.0.1:9"], "http://127.0.0.1:9/health did not answer"),
    ],
)
def test_what_users_get_wrong_ends_with_one_message_and_status_2(arguments, message, capsys):
    assert main(["reward", "test", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_every_built_in_reward_is_listed_with_a_sentence(capsys):
    assert main(["reward", "list"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in lines] == list(REWARDS)
    assert all(text.endswith(".") for _, text in lines)
