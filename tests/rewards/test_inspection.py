"""`flowalign reward test` and `list`: findings about good and bad rewards, and the images used."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from flowalign.cli import main
from flowalign.data.prompts import Prompt
from flowalign.errors import UserError
from flowalign.rewards import REWARDS
from flowalign.rewards.adapters import make_reward
from flowalign.rewards.inspection import bundled_samples, samples_from
from flowalign.rewards.registry import load_reward, load_rewards
from flowalign.training.reward_checks import score_noise
from tests.tiny import ROOT, sd3_config

NO_PROBLEM = "No problem found."


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    "spec",
    [
        "brightness",
        "jpeg_size",
        "{jpeg_size: {quality: 50}}",
        "sharpness",
        "scene_match",
        "clip_score",
        "vendi",
    ],
)
def test_built_in_rewards_have_no_problem(spec, capsys):
    assert main(["reward", "test", spec]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == NO_PROBLEM
    assert not [line for line in lines if line.startswith("!")]
    subjects = [
        "scores",
        "spread",
        "determinism",
        "order" if spec == "vendi" else "batch size",
        "speed",
        "gradient",
    ]
    assert [line.strip().partition(":")[0] for line in lines[9:-1]] == subjects
    assert len(lines) < 20


def test_the_screen_shows_the_traits_and_every_score(capsys):
    main(["reward", "test", "brightness"])
    lines = capsys.readouterr().out.splitlines()
    samples = bundled_samples()
    assert lines[0] == "brightness: pointwise, takes tensors"
    for line, image, prompt in zip(lines[1:9], samples.images, samples.prompts, strict=True):
        assert line.split(maxsplit=1) == [f"{image.mean():.4f}", prompt.text]
    assert "8 numbers, one per image, declared range [0, 1]" in lines[9]
    assert "reaches 8 of 8 images" in lines[-2]


OWN_REWARDS = """
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


def of_a_parameter(images, prompts, metadata):
    return torch.ones(len(images), requires_grad=True) * 2


def by_turns(images, prompts, metadata):
    calls.append(None)
    return [None if len(calls) % 2 else 1.0 for image in images]


calls = []


def by_a_field(images, prompts, metadata):
    return [entry["wanted"] for entry in metadata]


@traits(level="group")
def of_one_prompt(images, prompts, metadata):
    assert len(set(prompts)) == 1
    return images.mean((1, 2, 3)) * len(images)
"""


@pytest.fixture
def own(tmp_path) -> str:
    (tmp_path / "own.py").write_text(OWN_REWARDS)
    return f"{tmp_path}/own.py:"


@pytest.mark.parametrize(
    ("name", "finding", "problems"),
    [
        (
            "constant",
            "! spread:      constant: every image gets 1, so there is nothing to learn from it",
            "spread",
        ),
        (
            "random",
            "! determinism: in a second call, scores differ by up to",
            "determinism, batch size",
        ),
        (
            "of_the_batch",
            "! batch size:  one image at a time, scores differ by up to",
            "batch size",
        ),
        (
            "never",
            "! spread:      no image was scored; use --images with images made for the reward",
            "spread",
        ),
        (
            "by_turns",
            "! determinism: in a second call, other images are scored",
            "spread, determ",
        ),
        (
            "of_endless_slope",
            "! gradient:    does not reach the images, or is not finite",
            "gradient",
        ),
    ],
)
def test_a_problem_of_a_reward_is_named(name, finding, problems, own, capsys):
    assert main(["reward", "test", own + name]) == 1
    output = capsys.readouterr().out
    assert finding in output
    assert f"Problems found: {problems}" in output.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "rewards.raises raised OSError: no weights ("),
        ("wrong_shape", "rewards.wrong_shape returned shape (8, 3)"),
    ],
)
def test_a_reward_without_scores_ends_with_one_message(name, message, own, capsys):
    assert main(["reward", "test", own + name]) == 1
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize(
    ("name", "finding"),
    [
        (
            "of_arrays",
            "gradient:    none; only objectives that backpropagate through rewards need one",
        ),
        ("sometimes", "not scored"),
        ("of_one_prompt", "gradient:    reaches 8 of 8 images"),
    ],
)
def test_a_property_is_not_a_problem(name, finding, own, capsys):
    assert main(["reward", "test", own + name]) == 0
    assert finding in capsys.readouterr().out


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for level, name in ((50, "a_red_circle.png"), (150, "blue square.jpg"), (250, "three.webp")):
        Image.new("RGB", (40, 30), (level, level, level)).save(folder / name)
    (folder / "notes.txt").write_text("not a picture")
    return folder


def describe(folder: Path, *entries: dict) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries))


def test_file_names_are_prompts_without_metadata(folder, capsys):
    assert main(["reward", "test", "brightness", "--images", str(folder)]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:4]]
    assert [prompt for _, prompt in lines] == ["a red circle", "blue square", "three"]
    assert [float(score) for score, _ in lines] == pytest.approx(
        [50 / 255, 150 / 255, 250 / 255], abs=0.01
    )


def test_metadata_gives_prompts_and_fields(folder, own, capsys):
    describe(
        folder,
        {"file_name": "three.webp", "prompt": "a white wall", "wanted": 3.5},
        {"file_name": "a_red_circle.png", "prompt": "night", "wanted": -1},
    )
    assert main(["reward", "test", f"{own}by_a_field", "--images", str(folder)]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:3]]
    assert lines == [["3.5000", "a white wall"], ["-1.0000", "night"]]
    assert [prompt.metadata for prompt in samples_from(str(folder)).prompts] == [
        {"wanted": 3.5},
        {"wanted": -1},
    ]


def test_a_reward_of_groups_sees_one_prompt_at_a_time(folder, own, capsys):
    names = ["a_red_circle.png", "blue square.jpg", "three.webp"]
    describe(
        folder,
        *(
            {"file_name": name, "prompt": prompt}
            for name, prompt in zip(names, ("x", "y", "x"), strict=True)
        ),
    )
    assert main(["reward", "test", f"{own}of_one_prompt", "--images", str(folder)]) == 0
    scores = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()[1:4]]
    assert scores == pytest.approx([2 * 50 / 255, 150 / 255, 2 * 250 / 255], abs=0.01)


def test_a_reward_of_groups_that_depends_on_the_order_is_named(tmp_path, capsys):
    (tmp_path / "places.py").write_text(
        "from flowalign.rewards.base import traits\n\n"
        "@traits(level='group')\ndef first(images, prompts, metadata):\n"
        "    return [float(i == 0) for i in range(len(images))]\n"
    )
    assert main(["reward", "test", f"{tmp_path}/places.py:first"]) == 1
    assert "in reverse order, scores differ" in capsys.readouterr().out


def test_images_keep_their_size(folder, capsys):
    assert samples_from(str(folder)).images.shape == (3, 3, 30, 40)
    assert main(["reward", "test", "brightness", "--images", str(folder)]) == 0
    assert "  images:      3 of 3\n" in capsys.readouterr().out


def test_images_of_several_sizes_are_scaled_with_a_note(folder, capsys):
    Image.new("RGB", (80, 80)).save(folder / "zebra.png")
    assert samples_from(str(folder)).images.shape == (4, 3, 30, 40)
    main(["reward", "test", "brightness", "--images", str(folder)])
    assert (
        "images:      4 of 4, of several sizes, scaled and cropped to the first one's 40 x 30"
        in capsys.readouterr().out
    )


def test_a_few_images_are_taken_from_a_large_folder(folder):
    describe(folder, *({"file_name": "three.webp", "prompt": str(i)} for i in range(300)))
    samples = samples_from(str(folder))
    assert [prompt.text for prompt in samples.prompts] == [
        "0",
        "37",
        "75",
        "112",
        "150",
        "187",
        "225",
        "262",
    ]
    assert samples.about == "8 of 300"


def test_a_tilde_is_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert samples_from(f"~/{folder.name}").prompts == samples_from(str(folder)).prompts


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"file_name": "four.png", "prompt": "x"}], "--images: there is no image"),
        ([{"prompt": "x"}], 'metadata.jsonl, line 1 has no "file_name". Write for example'),
        (
            [{"file_name": "three.webp"}],
            'metadata.jsonl, line 1 has no "prompt". Write for example',
        ),
        ([{"file_name": "notes.txt", "prompt": "x"}], "notes.txt cannot be opened as an image"),
    ],
)
def test_metadata_that_does_not_fit_the_folder_is_an_error(entries, message, folder, capsys):
    describe(folder, *entries)
    assert main(["reward", "test", "brightness", "--images", str(folder)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["brightness", "--images", "nowhere"], "--images: there is no folder nowhere"),
        (
            ["brightness", "--images", "configs"],
            "--images: configs has no images. Use a folder of .png, .jpg",
        ),
        (["brightnes"], "Did you mean 'brightness'"),
        (["{brightness: 1, jpeg_size: 1}"], "names 2 rewards. Write one"),
        (["{brightness: "], "'{brightness: ' is not YAML"),
        (["{jpeg_size: {qualty: 3}}"], "Did you mean 'quality'"),
        (["nowhere.py:own"], "there is no file nowhere.py"),
        (["http://127.0.0.1:9"], "http://127.0.0.1:9/health did not answer"),
    ],
)
def test_a_mistake_of_the_user_ends_with_one_message_and_status_2(arguments, message, capsys):
    assert main(["reward", "test", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


PROMPTS = [Prompt("a red circle"), Prompt("a blue square"), Prompt("two stars")]


def inspect(reward, **settings) -> None:
    score_noise([reward], PROMPTS, sd3_config(), **settings)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("random", "rewards.random, determinism: in a second call, scores differ by up to"),
        (
            "by_turns",
            "rewards.by_turns, determinism: in a second call, other images are scored",
        ),
        (
            "of_the_batch",
            "rewards.of_the_batch, batch size: one image at a time, scores differ by up to",
        ),
        ("constant", ""),
    ],
)
def test_an_unreliable_reward_is_named_before_a_run(name, line, own, capsys):
    inspect(load_reward(own + name))
    output = capsys.readouterr().out
    assert line in output if line else not output


def test_an_image_is_scored_three_times_before_a_run_and_once_if_the_reward_is_known():
    sizes = []
    reward = make_reward(
        "counts",
        lambda images, prompts, metadata: sizes.append(len(images)) or images.mean((1, 2, 3)),
    )
    inspect(reward)
    assert sizes == [4, 4, 1, 1, 1, 1]
    inspect(reward, known=[reward])
    assert sizes[6:] == [4]


def test_an_infinite_score_ends_a_run_before_it_begins():
    with pytest.raises(UserError, match=r"rewards\.endless returned inf\. Return finite numbers"):
        inspect(make_reward("endless", lambda images, prompts, metadata: [math.inf] * len(images)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("of_arrays", "rewards.of_arrays raised RuntimeError: Can't call numpy"),
        ("constant", "rewards.constant carries no gradient from its scores to the images"),
        (
            "of_endless_slope",
            "rewards.of_endless_slope: the gradient of its scores does not reach the images, or is",
        ),
        (
            "of_a_parameter",
            "rewards.of_a_parameter: the gradient of its scores does not reach the images",
        ),
    ],
)
def test_a_missing_gradient_is_an_error_where_it_is_needed(name, message, own):
    inspect(load_reward(own + name))
    with pytest.raises(UserError, match=message):
        inspect(load_reward(own + name), needs_gradient=True)


def test_the_bundled_clip_refuses_large_images_before_the_model_loads():
    (reward,) = load_rewards({"clip_score": 1.0})
    with pytest.raises(UserError, match=r"rewards\.clip_score\.path is the bundled CLIP"):
        score_noise([reward], PROMPTS, sd3_config(height=512, width=512))


def test_every_built_in_reward_is_listed_with_its_first_line(capsys):
    assert main(["reward", "list"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in lines] == list(REWARDS)
    assert all(text.endswith(".") for _, text in lines)


def test_rewards_are_listed_without_importing_torch():
    code = (
        "import sys; from flowalign.rewards.registry import describe_rewards as describe; "
        "print(len(describe()), {'torch', 'transformers'} & set(sys.modules))"
    )
    run = [sys.executable, "-c", code]
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"{len(REWARDS)} set()"
