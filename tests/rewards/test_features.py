"""Small random backbones of the real classes; preprocessing that equals their processors'."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from flowalign.errors import RunError, UserError
from flowalign.rewards.adapters import to_pil
from flowalign.rewards.features import Backbone, BUNDLED_CLIP

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def random_dinov2(folder: Path) -> str:
    """Shows itself pictures as facebook/dinov2-base does, at a seventh of the size."""
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(image_size=32, patch_size=8, **SMALL)).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    BitImageProcessor(
        resample=3, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225], **sizes
    ).save_pretrained(folder)
    return str(folder)


def random_siglip(folder: Path) -> str:
    """Two backbones, and a processor that squeezes instead of cutting."""
    torch.manual_seed(0)
    text = {**SMALL, "vocab_size": 20, "max_position_embeddings": 8}
    SiglipModel(
        SiglipConfig(text_config=text, vision_config={**SMALL, "image_size": 32, "patch_size": 8})
    ).save_pretrained(folder)
    SiglipImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["clip", "dinov2", "siglip"])
def backbone(request, tmp_path) -> Backbone:
    paths = {"clip": lambda folder: BUNDLED_CLIP, "dinov2": random_dinov2, "siglip": random_siglip}
    return Backbone(paths[request.param](tmp_path / "backbone"), "key")


def noise(*shape: int) -> torch.Tensor:
    """Images in 256 levels, away from black and white, where Pillow clamps between its passes."""
    blocks = torch.rand(shape[0], 3, 9, 9, generator=torch.Generator().manual_seed(0))
    return F.interpolate(0.25 + 0.5 * blocks, shape[1:], mode="bilinear").mul(255).round() / 255


@pytest.mark.parametrize("size", [(50, 71), (41, 32), (20, 33), (64, 64)])
def test_the_preprocessing_is_the_processors(backbone, size):
    """Equal up to rounding to 8 bits after each of two passes, divided by the deviation."""
    images = noise(2, *size)
    expected = backbone.processor(images=to_pil(images), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(backbone.pixels(images), expected, atol=1.5 / 255 / 0.224, rtol=0)


def test_features_are_unit_vectors_of_the_models_own_output(backbone):
    images = noise(3, 64, 64)
    features = backbone(images)
    assert features.shape == (3, backbone.width)
    assert features.dtype == torch.float32
    own = backbone.encode(
        pixel_values=backbone.processor(images=to_pil(images), return_tensors="pt")["pixel_values"]
    ).pooler_output
    torch.testing.assert_close(features, own / own.norm(dim=1, keepdim=True), atol=0.02, rtol=0)
    torch.testing.assert_close(backbone.embed(images[1:2]), features[1:2])


def test_the_gradient_reaches_the_pixels_as_finite_differences_say(backbone):
    backbone.model.double()
    images = noise(1, 40, 48).double().requires_grad_()
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(1, backbone.width, generator=generator, dtype=torch.float64)
    direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)

    (backbone(images) * weights).sum().backward()
    assert images.grad is not None
    with torch.no_grad():
        up, down = ((backbone(images + h * direction) * weights).sum() for h in (1e-6, -1e-6))
    assert ((images.grad * direction).sum() - (up - down) / 2e-6).abs() < 1e-5 * images.grad.norm()


def test_dinov2_sees_squares_of_the_size_in_the_settings(tmp_path):
    backbone = Backbone(random_dinov2(tmp_path), "key", size=48)
    assert backbone.pixels(noise(1, 64, 80)).shape == (1, 3, 48, 48)
    assert backbone(noise(1, 64, 80)).shape == (1, 16)


def test_a_backbone_that_cannot_be_used_is_named():
    with pytest.raises(UserError, match=r"rewards.vendi.path: there is no folder \./none"):
        Backbone("./none", "rewards.vendi.path")
    with pytest.raises(
        UserError, match=r"rewards\.adversarial\.path: .* does not turn an image into one vector"
    ):
        Backbone(BUNDLED_CLIP, "rewards.adversarial.path", size=518)


def test_the_bundled_clip_sees_no_pictures_of_another_world(tmp_path):
    backbone = Backbone(BUNDLED_CLIP, "rewards.vendi.path")
    assert backbone(noise(1, 128, 128)).shape == (1, backbone.width)
    with pytest.raises(
        RunError,
        match=r"rewards\.vendi\.path is the bundled CLIP.* 130 x 64.*path: openai/clip-vit-large",
    ):
        backbone(noise(1, 64, 130))
    assert Backbone(random_dinov2(tmp_path), "key")(noise(1, 64, 130)).shape == (1, 16)


def test_a_backbone_without_a_trained_pooled_output_is_an_error(tmp_path):
    sizes = {**SMALL, "image_size": 32, "patch_size": 8}
    models = {
        "lacks": ViTModel(ViTConfig(**sizes), add_pooling_layer=False),
        "has none": ViTMAEModel(ViTMAEConfig(**sizes)),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        BitImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ).save_pretrained(tmp_path / name)
    with pytest.raises(
        UserError, match=r"key: .* has no weights for pooler\.dense\.bias, which would be random"
    ):
        Backbone(str(tmp_path / "lacks"), "key")
    with pytest.raises(UserError, match=r"key: .* does not turn an image into one vector"):
        Backbone(str(tmp_path / "has none"), "key")
