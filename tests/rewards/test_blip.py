"""ImageReward on a small random BLIP, with weights under the names of the published file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, Tensor
from torch.nn import functional as F
from torchvision import transforms
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
)
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from flowalign.errors import UserError
from flowalign.rewards.adapters import make_reward, to_pil
from flowalign.rewards.blip import ImageReward
from flowalign.settings.types import configure

PROMPTS = ["a red circle", "the blue square on the table", "a table and a red square"]
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a the red blue circle square table on and".split()
VISION = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
    "embeddings.patch_embedding.bias": "patch_embed.proj.bias",
    "post_layernorm.weight": "norm.weight",
    "post_layernorm.bias": "norm.bias",
}
LAYER = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.qkv": "attn.qkv",
    "self_attn.projection": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


class Original(nn.Module):
    """The parts of ImageReward, put together as its paper does."""

    def __init__(self) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"num_hidden_layers": 2, "intermediate_size": 48}
        self.vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=128,
                num_attention_heads=2,
                image_size=32,
                patch_size=8,
                layer_norm_eps=1e-6,
                **sizes,
            )
        )
        self.text = BlipTextModel(
            BlipTextConfig(
                **{
                    "hidden_size": 64,
                    "num_attention_heads": 1,
                    "encoder_hidden_size": 128,
                    "vocab_size": 20,
                    **sizes,
                },
                **{"max_position_embeddings": 40, "bos_token_id": None, "sep_token_id": None},
            ),
            add_pooling_layer=False,
        )
        layers = [
            nn.Linear(64, 16),
            nn.Dropout(0.2),
            nn.Linear(16, 4),
            nn.Dropout(0.1),
            nn.Linear(4, 1),
        ]
        self.mlp = nn.Sequential(*layers)
        for name, parameter in self.named_parameters():
            nn.init.normal_(
                parameter,
                mean=float(name.lower().endswith(("norm.weight", "norm1.weight", "norm2.weight"))),
                std=0.2,
            )

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """One picture and one prompt without padding."""
        features = self.vision(pixels).last_hidden_state
        read = self.text(tokens, encoder_hidden_states=features, is_decoder=False).last_hidden_state
        return (self.mlp(read[0, 0])[0] - 0.16717362830052426) / 1.0333394966054072

    def published(self) -> dict[str, Tensor]:
        """The weights as the published file names them, with what else it holds."""
        converted = {f"mlp.layers.{name}": tensor for name, tensor in self.mlp.state_dict().items()}
        converted |= {
            f"blip.text_encoder.{name}": tensor for name, tensor in self.text.state_dict().items()
        }
        state = self.vision.state_dict()
        converted |= {
            f"blip.visual_encoder.{published}": state[ours] for ours, published in VISION.items()
        }
        for n in range(2):
            for ours, published in LAYER.items():
                for end in ("weight", "bias"):
                    converted[f"blip.visual_encoder.blocks.{n}.{published}.{end}"] = state[
                        f"encoder.layers.{n}.{ours}.{end}"
                    ]
        unused = {
            "blip.vision_proj.weight": torch.zeros(4, 128),
            "blip.text_encoder.embeddings.position_ids": torch.arange(40),
        }
        return converted | unused


@pytest.fixture(scope="module")
def original() -> Original:
    torch.manual_seed(0)
    return Original().eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, original) -> Path:
    folder = tmp_path_factory.mktemp("blip")
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    torch.save(original.published(), folder / "ImageReward.pt")
    return folder


@pytest.fixture
def reward(folder) -> ImageReward:
    return ImageReward(str(folder / "ImageReward.pt"), str(folder))


def pictures(count: int, height: int, width: int) -> Tensor:
    spots = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(count))
    return F.interpolate(0.25 + 0.5 * spots, (height, width), mode="bilinear")


def test_the_published_names_give_the_scores_of_the_model_that_wrote_them(reward, original):
    images = pictures(3, 32, 32)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        expected = [
            original(
                ((image - mean) / std)[None],
                torch.tensor([[2, *(WORDS.index(word) for word in prompt.split()), 3]]),
            )
            for image, prompt in zip(images, PROMPTS, strict=True)
        ]
    torch.testing.assert_close(
        reward(images, PROMPTS, [{}] * 3), torch.stack(expected), atol=1e-5, rtol=0
    )


def test_the_picture_and_the_prompt_both_count(reward):
    images = pictures(3, 32, 32)
    assert reward(images[:1].repeat(3, 1, 1, 1), PROMPTS, [{}] * 3).std() > 1e-3
    assert reward(images, PROMPTS[:1] * 3, [{}] * 3).std() > 1e-3


def test_a_picture_scores_the_same_again_and_in_any_company(reward):
    scorer, images = make_reward("image_reward", reward), pictures(3, 50, 41)
    together = scorer(images, PROMPTS, [{}] * 3)
    alone = torch.cat([scorer(images[i : i + 1], PROMPTS[i : i + 1], [{}]) for i in range(3)])
    assert torch.equal(together, scorer(images, PROMPTS, [{}] * 3))
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=0)


def test_the_gradient_is_that_of_finite_differences(reward):
    for encoder in (reward.vision, reward.text):
        encoder.double()
    images = pictures(3, 40, 52).double().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS, [{}] * 3).sum(), images)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(2)).double()
    with torch.no_grad():
        high, low = (
            reward(images + step * direction, PROMPTS, [{}] * 3).sum() for step in (1e-5, -1e-5)
        )
    assert gradient.flatten(1).norm(dim=1).min() > 1e-4
    assert ((high - low) / 2e-5).item() == pytest.approx(
        (gradient * direction).sum().item(), rel=1e-5
    )


@pytest.mark.parametrize("size", [(64, 70), (70, 64), (512, 528), (64, 74), (32, 33), (50, 41)])
def test_pictures_are_cropped_as_torchvision_crops_them(reward, size):
    """A margin of half a pixel is rounded to the even number: 35 columns of 32 lose 2 and 1."""
    images = F.interpolate(torch.rand(1, 3, 40, 40), size, mode="bilinear").mul(255).round() / 255
    prepare = transforms.Compose(
        [transforms.Resize(32, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(32)]
    )
    expected = transforms.functional.to_tensor(prepare(to_pil(images)[0]))
    seen = []
    reward.vision.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    reward(images, PROMPTS[:1], [{}])
    std, mean = (torch.tensor(v).view(3, 1, 1) for v in (OPENAI_CLIP_STD, OPENAI_CLIP_MEAN))
    # A level is 0.004: PIL rounds twice, after each direction.
    torch.testing.assert_close(seen[0][0] * std + mean, expected, atol=0.012, rtol=0)


def test_prompts_are_cut_after_35_tokens(reward):
    images = pictures(1, 32, 32).repeat(2, 1, 1, 1)
    with pytest.warns(
        UserWarning,
        match=r"rewards\.image_reward reads 35 tokens of a prompt; of 2 prompts 1 \(50%\)",
    ):
        scores = reward(images, [" ".join(["red"] * 50), " ".join(["red"] * 33)], [{}] * 2)
    assert scores[0].item() == pytest.approx(scores[1].item(), abs=1e-6)


def test_half_precision_returns_float32(folder, reward):
    rough = ImageReward(str(folder / "ImageReward.pt"), str(folder), dtype="bfloat16")
    images = pictures(3, 32, 32)
    scores = rough(images, PROMPTS, [{}] * 3)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reward(images, PROMPTS, [{}] * 3), atol=0.1, rtol=0)


def test_another_file_is_an_error(folder, tmp_path, original):
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, tmp_path / "other.pt")
    with pytest.raises(
        UserError,
        match=r"rewards\.image_reward\.path: the file is not ImageReward's: .* it has weight",
    ):
        ImageReward(str(tmp_path / "other.pt"), str(folder))
    weights = original.published()
    del weights["blip.visual_encoder.norm.bias"]
    torch.save(weights, tmp_path / "lacking.pt")
    with pytest.raises(
        UserError,
        match=r"the file lacks 1 weights of a BlipVisionModel, such as post_layernorm\.bias",
    ):
        ImageReward(str(tmp_path / "lacking.pt"), str(folder))
    with pytest.raises(
        UserError, match=r"rewards\.image_reward\.path: there is no file .*nowhere\.pt"
    ):
        configure(ImageReward, {"path": str(tmp_path / "nowhere.pt")}, "rewards.image_reward")
    with pytest.raises(
        UserError, match=r"rewards\.image_reward\.tokenizer: there is no folder \./nowhere"
    ):
        ImageReward(str(folder / "ImageReward.pt"), "./nowhere")
