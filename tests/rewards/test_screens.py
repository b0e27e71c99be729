"""`flowalign reward test` for every built-in reward, on small random models of the real classes."""

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
from tests.rewards.test_taste import write_votes
from tests.rewards.vlm.test_local import qwen2_vl
from tests.rewards.vlm.test_server import completion, Reply, serving, text_of

__all__ = ["blip", "clip", "original"]
CAPTIONS = ("a red circle", "a blue square", "two green triangles")
UNDECIDED = {"geneval": "spread", "geneval_graded": "spread", "rubric": "spread"}
"""Random weights detect and write the same for every image, or no score."""


def reply(body: dict[str, Any], count: int) -> Reply:
    """A chat completion that differs from caption to caption."""
    score = len(text_of(body)) % 5 + 1
    return 200, completion(f"Final Score: {score}", top={"Yes": -score, "No": -1})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of images with words, and metadata with every field that a reward reads."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for caption, color, word in zip(
        CAPTIONS, ("red", "blue", "green"), ("OPEN", "EXIT", "NEWS"), strict=True
    ):
        picture = Image.new("RGB", (256, 256), "white")
        draw = ImageDraw.Draw(picture)
        draw.text((20, 20), word, fill="black", font=ImageFont.load_default(64))
        draw.ellipse((100, 120, 200, 220), fill=color)
        picture.save(folder / f"{word}.png")
        wanted = {"tag": "single_object", "include": [{"class": "cup", "count": 1}]}
        fields = {
            "text": word.replace("NEWS", "NEWSPAPER"),
            "ref_image": str(folder / "OPEN.png"),
            **wanted,
        }
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
    """The settings that each reward needs here, by name."""
    models = tmp_path_factory.mktemp("models")
    detection = {
        "detector": random_yolos(models / "yolos"),
        "clip": random_color_clip(models / "clip"),
    }
    local, backbone = {"path": judge, "dtype": "float32"}, {"path": str(clip)}
    both = {**backbone, "processor": str(clip)}
    return {
        **dict.fromkeys(("clip_score", "clip_image", "vendi"), backbone),
        "pick_score": both,
        "hps": both,
        "aesthetic": {"path": str(clip), "head": str(clip / "head.pth")},
        "image_reward": {"path": str(blip / "ImageReward.pt"), "tokenizer": str(blip)},
        **dict.fromkeys(("geneval", "geneval_graded"), detection),
        **dict.fromkeys(("vqa_score", "reward_dance", "prompt_echo"), local),
        "taste": {**backbone, "dimensions": 4, "votes": write_votes(models, "red")},
        "rubric": {**local, "max_new_tokens": 4},
        **{
            name: {**backbone, "pictures": str(pictures)}
            for name in ("adversarial", "feature_distance")
        },
    }


@pytest.mark.parametrize("name", REWARDS)
def test_every_built_in_reward_can_be_inspected(name, settings, pictures, capsys):
    with serving(reply) as server:
        own = server.settings() if name.endswith("_server") else settings.get(name, {})
        spec = json.dumps({name: own}) if own else name
        status = main(["reward", "test", spec, "--images", str(pictures)])
    screen = capsys.readouterr().out
    verdict = f"Problems found: {UNDECIDED[name]}." if name in UNDECIDED else "No problem found."
    assert (status, screen.splitlines()[-1]) == (int(name in UNDECIDED), verdict)
    for part in (
        f"{name}: ",
        "scores:",
        "spread:",
        "determinism:",
        "speed:",
        "gradient:",
        CAPTIONS[0],
    ):
        assert part in screen
