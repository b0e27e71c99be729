"""Every built-in reward has its screen, on small random models of the real classes."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw, ImageFont

from flowalign.cli import main
from flowalign.rewards import REWARDS
from tests.rewards.test_blip import folder as blip
from tests.rewards.test_blip import original
from tests.rewards.test_clip import folder as clip
from tests.rewards.test_geneval import random_color_clip, random_yolos
from tests.rewards.test_judge import qwen2_vl
from tests.rewards.test_judge_server import serving, YES

__all__ = ["blip", "clip", "original"]
CAPTIONS = ("a red circle", "a blue square", "two green triangles")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of pictures with words, and with every field that a reward reads."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for caption, color, word in zip(CAPTIONS, ("red", "blue", "green"), ("OPEN", "EXIT", "NEWS"), strict=True):
        picture = Image.new("RGB", (256, 256), "white")
        draw = ImageDraw.Draw(picture)
        draw.text((20, 20), word, fill="black", font=ImageFont.load_default(64))
        draw.ellipse((100, 120, 200, 220), fill=color)
        picture.save(folder / f"{word}.png")
        wanted = {"tag": "single_object", "include": [{"class": "cup", "count": 1}]}
        fields = {"text": word, "ref_image": str(folder / "OPEN.png"), **wanted}
        lines.append(json.dumps({"file_name": f"{word}.png", "prompt": caption, **fields}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("judge")
    for part in qwen2_vl():
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def settings(tmp_path_factory, clip, blip, judge, pictures) -> dict[str, dict[str, Any]]:
    """By name, what a reward needs here."""
    models = tmp_path_factory.mktemp("models")
    examined = {"detector": random_yolos(models / "yolos"), "clip": random_color_clip(models / "clip")}
    local, shown = {"path": judge, "dtype": "float32"}, {"pictures": str(pictures)}
    both = {"path": str(clip), "processor": str(clip)}
    return {
        "pick_score": both,
        "hps": both,
        "aesthetic": {"path": str(clip), "head": str(clip / "head.pth")},
        "image_reward": {"path": str(blip / "ImageReward.pt"), "tokenizer": str(blip)},
        **dict.fromkeys(("geneval", "geneval_graded"), examined),
        **dict.fromkeys(("vqa_score", "reward_dance", "prompt_echo"), local),
        "rubric": {**local, "max_new_tokens": 4},
        **dict.fromkeys(("adversarial", "feature_distance"), shown),
    }


@pytest.mark.parametrize("name", REWARDS)
def test_every_built_in_reward_has_its_screen(name, settings, pictures, capsys):
    with serving(lambda body, count: YES) as server:
        own = server.settings() if name.endswith("_server") else settings.get(name, {})
        spec = json.dumps({name: own}) if own else name
        status = main(["reward", "test", spec, "--images", str(pictures)])
    screen = capsys.readouterr().out
    assert status == int("Look at:" in screen)
    for part in (f"{name}: ", "scores:", "spread:", "determinism:", "speed:", "gradient:", CAPTIONS[0]):
        assert part in screen
    assert "! determinism" not in screen
    assert "! batch size" not in screen
