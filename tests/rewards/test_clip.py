"""The CLIP family, on a small random CLIP in the files that the published ones come in."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn, Tensor
from torch.nn import functional as F
from torchvision.transforms import functional as vision
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPImageProcessorPil,
    CLIPModel,
)

from flowalign.errors import RunError, UserError
from flowalign.rewards.adapters import make_reward, to_pil
from flowalign.rewards.clip import (
    Aesthetic,
    Clip,
    ClipImage,
    ClipScore,
    HPSv2,
    PickScore,
)
from flowalign.rewards.features import BUNDLED_CLIP
from flowalign.rewards.preprocessing import plain_text, RowCache
from flowalign.rewards.weights import affine, read_weights
from flowalign.settings.types import configure

PROMPTS = ["a red circle", "a blue square", "a circle and a square"]
LONG = "a red circle and a blue square and a green triangle"
FAMILY = {cls.name: cls for cls in (ClipScore, PickScore, HPSv2, Aesthetic)}
CLASSES = {**FAMILY, "clip_image": ClipImage}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A CLIP of 32 pixels with the bundled vocabulary and OpenAI's mean and deviation."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tower = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "projection_dim": 24,
    }
    text = {
        **tower,
        "vocab_size": 107,
        "max_position_embeddings": 10,
        "bos_token_id": 105,
        "eos_token_id": 106,
    }
    image = {**tower, "image_size": 32, "patch_size": 8}
    model = CLIPModel(
        CLIPConfig(
            text_config={**text, "pad_token_id": 106}, vision_config=image, projection_dim=24
        )
    )
    for name, parameter in model.named_parameters():
        if name != "logit_scale":
            nn.init.normal_(
                parameter, mean=float("norm" in name and name.endswith("weight")), std=0.2
            )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BUNDLED_CLIP).save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    to_pil(pictures(1, 40, 50))[0].save(folder / "reference.png")
    torch.save(head().state_dict(), folder / "head.pth")
    return folder


def head(width: int = 24) -> nn.Module:
    """The published layers, smaller."""
    torch.manual_seed(1)
    layers = [
        nn.Linear(width, 16),
        nn.Dropout(0.2),
        nn.Linear(16, 8),
        nn.Dropout(0.1),
        nn.Linear(8, 4),
        nn.Linear(4, 1),
    ]
    return nn.ModuleDict({"layers": nn.Sequential(*layers)}).eval()


def pictures(count: int, height: int, width: int) -> Tensor:
    """Soft spots in 256 levels, away from black and white."""
    spots = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(count))
    return (
        F.interpolate(0.25 + 0.5 * spots, (height, width), mode="bilinear").mul(255).round() / 255
    )


@pytest.fixture
def make(folder):
    """A function that makes a reward by name, from that folder."""

    def make_named(name: str, **settings: Any) -> Any:
        own = {"hps": {"processor": str(folder)}, "pick_score": {"processor": str(folder)}}
        own["aesthetic"] = {"head": str(folder / "head.pth")}
        return CLASSES[name](**{"path": str(folder), **own.get(name, {}), **settings})

    return make_named


@pytest.fixture
def metadata(folder) -> list[dict[str, Any]]:
    return [{"ref_image": str(folder / "reference.png")} for _ in PROMPTS]


def by_hand(folder: Path, images: Tensor) -> Any:
    """The outputs of transformers for images of the model's own size, and for every prompt."""
    processor = CLIPImageProcessor.from_pretrained(folder)
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in (processor.image_mean, processor.image_std)
    )
    tokens = AutoTokenizer.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return CLIPModel.from_pretrained(folder).eval()(
            pixel_values=(images - mean) / std, **tokens
        )


def test_clip_score_is_the_cosine_of_two_features(make, folder):
    images = pictures(3, 32, 32)
    model = by_hand(folder, images)
    text, image = (
        output.pooler_output for output in (model.text_model_output, model.vision_model_output)
    )
    cosine = (text * image).sum(1) / text.norm(dim=1) / image.norm(dim=1)
    torch.testing.assert_close(
        make("clip_score")(images, PROMPTS, [{}] * 3), cosine, atol=1e-6, rtol=0
    )


def test_a_prefix_stands_before_every_prompt(make):
    images = pictures(3, 32, 32)
    expected = make("clip_score")(images, [f"a red {prompt}" for prompt in PROMPTS], [{}] * 3)
    assert torch.equal(make("clip_score", prefix="a red ")(images, PROMPTS, [{}] * 3), expected)


def test_pick_score_is_the_diagonal_of_the_models_logits_over_26(make, folder):
    images = pictures(3, 32, 32)
    expected = by_hand(folder, images).logits_per_image.diagonal() / 26
    torch.testing.assert_close(
        make("pick_score")(images, PROMPTS, [{}] * 3), expected, atol=1e-5, rtol=0
    )


def open_clip_names(model: CLIPModel) -> dict[str, Tensor]:
    """The weights as open_clip would have written them."""
    state = dict(model.state_dict())
    converted = {
        "logit_scale": state["logit_scale"],
        "visual.proj": state["visual_projection.weight"].T,
    }
    converted["text_projection"] = state["text_projection.weight"].T
    towers = {
        "visual.": ("vision_model", "pre_layrnorm", "post_layernorm"),
        "": ("text_model", "", "final_layer_norm"),
    }
    for prefix, (tower, before, after) in towers.items():
        converted[f"{prefix}positional_embedding"] = state[
            f"{tower}.embeddings.position_embedding.weight"
        ]
        for end in ("weight", "bias"):
            converted[f"{prefix}{'ln_post' if prefix else 'ln_final'}.{end}"] = state[
                f"{tower}.{after}.{end}"
            ]
            if before:
                converted[f"{prefix}ln_pre.{end}"] = state[f"{tower}.{before}.{end}"]
            for n in range(2):
                ours, theirs = f"{tower}.encoder.layers.{n}", f"{prefix}transformer.resblocks.{n}"
                converted[f"{theirs}.attn.in_proj_{end}"] = torch.cat(
                    [state[f"{ours}.self_attn.{x}_proj.{end}"] for x in "qkv"]
                )
                parts = {
                    "attn.out_proj": "self_attn.out_proj",
                    "ln_1": "layer_norm1",
                    "ln_2": "layer_norm2",
                }
                for new, old in (parts | {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}).items():
                    converted[f"{theirs}.{new}.{end}"] = state[f"{ours}.{old}.{end}"]
    converted["visual.class_embedding"] = state["vision_model.embeddings.class_embedding"]
    converted["visual.conv1.weight"] = state["vision_model.embeddings.patch_embedding.weight"]
    converted["token_embedding.weight"] = state["text_model.embeddings.token_embedding.weight"]
    return {name: tensor.contiguous() for name, tensor in converted.items()}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_hps_reads_open_clips_weights(make, folder, tmp_path, suffix):
    file, weights = tmp_path / f"hps.{suffix}", open_clip_names(CLIPModel.from_pretrained(folder))
    save_file(weights, file) if suffix == "safetensors" else torch.save(
        {"epoch": 2, "state_dict": weights}, file
    )
    images = pictures(3, 32, 32)
    scores = make("hps", path=str(file))(images, PROMPTS, [{}] * 3)
    assert torch.equal(scores, make("hps")(images, PROMPTS, [{}] * 3))
    torch.testing.assert_close(
        scores, make("clip_score")(images, PROMPTS, [{}] * 3), atol=1e-6, rtol=0
    )


def test_weights_that_do_not_fit_are_an_error(make, folder, tmp_path):
    weights = open_clip_names(CLIPModel.from_pretrained(folder))
    torch.save(
        {name: tensor for name, tensor in weights.items() if name != "ln_final.bias"},
        tmp_path / "lacking.pt",
    )
    with pytest.raises(
        UserError,
        match=r"rewards\.hps\.path: the file lacks 1 weights .* text_model\.final_layer_norm\.bias",
    ):
        make("hps", path=str(tmp_path / "lacking.pt"))
    torch.save(weights | {"visual.proj": torch.zeros(32, 25)}, tmp_path / "wrong.pt")
    with pytest.raises(UserError, match=r"rewards\.hps\.path: the weights do not fit a CLIPModel"):
        make("hps", path=str(tmp_path / "wrong.pt"))


def test_layers_without_activations_are_one_affine_map(folder):
    weight, bias = affine(torch.load(folder / "head.pth", weights_only=True), "layers.", "key")
    x = torch.randn(50, 24)
    torch.testing.assert_close(x @ weight + bias, head()["layers"](x)[:, 0], atol=1e-5, rtol=0)


def test_the_aesthetic_score_is_the_head_of_a_feature_of_length_one(make, folder):
    images = pictures(3, 32, 32)
    feature = by_hand(folder, images).image_embeds
    torch.testing.assert_close(feature.norm(dim=1), torch.ones(3))
    scores = make("aesthetic")(images, PROMPTS, [{}] * 3)
    torch.testing.assert_close(scores, head()["layers"](feature)[:, 0], atol=1e-5, rtol=0)


def test_a_head_of_another_network_is_an_error(make, tmp_path):
    torch.save(head(width=30).state_dict(), tmp_path / "head.pth")
    with pytest.raises(
        UserError, match=r"rewards\.aesthetic\.head: .* takes 30 features, but .* has 24"
    ):
        make("aesthetic", head=str(tmp_path / "head.pth"))
    torch.save({"weight": torch.zeros(1, 24)}, tmp_path / "head.pth")
    with pytest.raises(UserError, match=r"has no layers\.0\.weight; it has weight"):
        make("aesthetic", head=str(tmp_path / "head.pth"))


def test_a_picture_equals_itself_and_is_not_scored_without_a_reference(make, folder):
    reward, entry = make("clip_image"), {"ref_image": str(folder / "reference.png")}
    scores = make_reward("clip_image", reward)(
        pictures(1, 40, 50).repeat(2, 1, 1, 1), PROMPTS[:2], [entry, {"ref_image": None}]
    )
    assert scores[0] == pytest.approx(1, abs=1e-6)
    assert scores[1].isnan()


def test_a_reference_is_read_once(make, metadata):
    reward, calls = make("clip_image"), []
    reward.backbone.model.vision_model.register_forward_hook(
        lambda module, inputs, output: calls.append(1)
    )
    for _ in range(3):
        reward(pictures(3, 32, 32), PROMPTS, metadata)
    assert len(calls) == 3 + 1


def test_a_prompt_without_a_reference_image_is_an_error(make):
    reward = make_reward("clip_image", make("clip_image"))
    with pytest.raises(
        RunError, match=r"rewards\.clip_image: the prompt 'a blue square' has no field 'ref_image'"
    ):
        reward(pictures(2, 32, 32), PROMPTS[:2], [{"ref_image": None}, {}])
    with pytest.raises(
        RunError, match=r"rewards\.clip_image: ref_image nowhere\.png does not exist"
    ):
        reward(pictures(1, 32, 32), PROMPTS[:1], [{"ref_image": "nowhere.png"}])


def test_the_bundled_clip_judges_no_pictures_of_another_world():
    reward = make_reward("clip_score", ClipScore())
    assert reward(pictures(1, 128, 128), PROMPTS[:1], [{}]).isfinite()
    with pytest.raises(
        RunError,
        match=r"rewards\.clip_score\.path is the bundled CLIP.* 512 x 512.* path: openai/clip-vit",
    ):
        reward(pictures(1, 512, 512), PROMPTS[:1], [{}])


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (50, 70), (71, 41), (20, 24)])
def test_tensors_are_prepared_as_the_processor_prepares_pictures(make, folder, size):
    reward, images = make("clip_score"), pictures(3, *size)
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(
        to_pil(images), return_tensors="pt"
    ).pixel_values
    assert pixels.shape == (3, 3, 32, 32)
    difference = (reward._pixels(images) - pixels).abs()
    assert difference.mean() < 1e-2
    with torch.no_grad():
        feature = reward.model.get_image_features(pixels).pooler_output
        text = reward.prompt_features(PROMPTS, images.device)
    torch.testing.assert_close(
        reward(images, PROMPTS, [{}] * 3), F.cosine_similarity(feature, text), atol=1e-2, rtol=0
    )


def test_long_pictures_are_cut_and_not_squeezed_and_hps_shows_them_whole(make):
    images = pictures(1, 32, 96)
    changed = images.clone()
    changed[..., :24] = 0.9
    for name, sees_the_edge in (("clip_score", False), ("hps", True)):
        reward = make(name)
        before, after = (reward(x, PROMPTS[:1], [{}]) for x in (images, changed))
        assert torch.equal(before, after) != sees_the_edge


def test_hps_puts_pictures_on_black(make):
    reward = make("hps")
    pixels = reward._pixels(torch.ones(1, 3, 40, 80))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (reward.mean, reward.std))
    black, white = ((level - mean) / std for level in (0, 1))
    torch.testing.assert_close(pixels[0, :, :8], black.expand(3, 8, 32))
    torch.testing.assert_close(pixels[0, :, 8:24], white.expand(3, 16, 32))
    torch.testing.assert_close(pixels[0, :, 24:], black.expand(3, 8, 32))


@pytest.mark.parametrize("size", [(40, 40), (448, 448), (40, 80), (71, 41), (31, 64)])
def test_hps_prepares_pixels_as_its_package(make, size):
    """It resizes tensors, so the filter's overshoot at edges stays, and then pads."""
    reward = make("hps")
    images = (torch.arange(size[1]) > size[1] // 2).float().expand(1, 3, *size)
    scale = 32 / float(max(size))
    resized = [round(side * scale) for side in size]
    pixels = vision.resize(images, resized, vision.InterpolationMode.BICUBIC)
    height, width = (32 - side for side in resized)
    margins = [width // 2, height // 2, width - width // 2, height - height // 2]
    expected = vision.normalize(vision.pad(pixels, margins, fill=0), reward.mean, reward.std)
    torch.testing.assert_close(reward._pixels(images), expected, atol=1e-6, rtol=0)
    assert pixels.min() < -0.005


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat\u2019s \u201cred hat\u201d", 'a cat\'s "red hat"'),
        ("salt &amp; pepper", "salt & pepper"),
        ("salt &amp;amp; pepper &ldquo;mill&rdquo;", 'salt & pepper "mill"'),
        ("  two\n words\t", "two words"),
        ("\ufb01sh in \uff21\uff22\u3000C", "fish in AB C"),
        ("cafe\u0301\x07", "caf\u00e9"),
        ("a red circle", "a red circle"),
    ],
)
def test_hps_reads_prompts_as_its_package_cleans_them(make, prompt, expected):
    assert plain_text(prompt) == expected
    reward = make("hps")
    reward(pictures(1, 32, 32), [prompt], [{}])
    assert list(reward.prompt_features.rows) == [expected]


@pytest.mark.parametrize("name", CLASSES)
def test_the_gradient_is_that_of_finite_differences(make, metadata, name):
    reward = make(name)
    (reward.backbone if name == "clip_image" else reward).model.double()
    images = pictures(3, 40, 52).double().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS, metadata).sum(), images)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(2)).double()
    with torch.no_grad():
        high, low = (
            reward(images + step * direction, PROMPTS, metadata).sum() for step in (1e-5, -1e-5)
        )
    assert gradient.flatten(1).norm(dim=1).min() > 1e-4
    assert ((high - low) / 2e-5).item() == pytest.approx(
        (gradient * direction).sum().item(), rel=1e-5
    )


@pytest.mark.parametrize("name", CLASSES)
def test_a_picture_scores_the_same_again_and_in_any_company(make, metadata, name):
    reward, images = make_reward(name, make(name)), pictures(3, 40, 52)
    together = reward(images, PROMPTS, metadata)
    alone = torch.cat(
        [reward(images[i : i + 1], PROMPTS[i : i + 1], metadata[i : i + 1]) for i in range(3)]
    )
    assert torch.equal(together, reward(images, PROMPTS, metadata))
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=0)
    assert together.std() > 1e-4


@pytest.mark.parametrize("name", FAMILY)
def test_half_precision_changes_scores_little_and_returns_float32(make, metadata, name):
    images = pictures(3, 32, 32)
    rough, exact = (
        make(name, dtype=dtype)(images, PROMPTS, metadata) for dtype in ("bfloat16", "float32")
    )
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.05, rtol=0)


def test_a_prompt_is_encoded_once(make):
    reward, rows = make("pick_score"), []
    reward.model.text_model.register_forward_hook(
        lambda module, inputs, output: rows.append(len(output.pooler_output))
    )
    for prompts in (["a", "b", "a"], ["b", "a"], ["c", "a"]):
        reward(pictures(len(prompts), 32, 32), prompts, [{}] * len(prompts))
    assert rows == [2, 1]


def test_only_the_last_rows_are_cached():
    computed = []
    lengths = RowCache(
        lambda keys: computed.extend(keys) or torch.tensor([float(len(key)) for key in keys]),
        size=2,
    )
    for keys in (["a", "bb", "ccc"], ["bb", "ccc"], ["a", "bb"]):
        assert lengths(keys, torch.device("cpu")).tolist() == [len(key) for key in keys]
    assert computed == ["a", "bb", "ccc", "a"]


def test_cut_prompts_are_a_warning_once(make, recwarn):
    reward = make("clip_score")
    images = pictures(2, 32, 32)
    with pytest.warns(
        UserWarning,
        match=r"rewards\.clip_score reads 10 tokens of a prompt; of 2 prompts 1 \(50%\) are longer",
    ):
        scores = reward(images, [LONG, PROMPTS[0]], [{}] * 2)
    recwarn.clear()
    again = reward(images, [f"{LONG} and more", PROMPTS[0]], [{}] * 2)
    assert not recwarn.list
    torch.testing.assert_close(again, scores)


def test_a_missing_folder_or_file_is_named(make, tmp_path):
    with pytest.raises(
        UserError, match=r"rewards\.clip_score\.path: there is no folder \./nowhere"
    ):
        make("clip_score", path="./nowhere")
    with pytest.raises(
        UserError, match=r"rewards\.pick_score\.processor: there is no folder \./nowhere"
    ):
        make("pick_score", processor="./nowhere")
    with pytest.raises(
        UserError,
        match=r"rewards\.aesthetic\.head: there is no file \./head\.pth\. Give a local file",
    ):
        make("aesthetic", head="./head.pth")
    with pytest.raises(UserError, match=r"rewards\.hps\.path: there is no file .*nowhere\.pt"):
        make("hps", path=str(tmp_path / "nowhere.pt"))


def test_a_file_with_more_than_tensors_is_an_error(tmp_path):
    torch.save({"state_dict": Image.new("RGB", (2, 2))}, tmp_path / "code.pt")
    with pytest.raises(UserError, match=r"key: .*code\.pt cannot be read as a file of tensors"):
        read_weights("key", str(tmp_path / "code.pt"))


def test_settings_are_those_of_yaml(folder):
    reward = configure(
        PickScore,
        {"path": str(folder), "processor": str(folder), "dtype": "bfloat16"},
        "rewards.pick_score",
    )
    assert isinstance(reward, Clip)
    assert reward.model.dtype == torch.bfloat16
    with pytest.raises(UserError, match="dtype"):
        configure(PickScore, {"dtype": "int8"}, "rewards.pick_score")
