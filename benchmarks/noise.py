"""A reward without information, for controls: what training does that nothing is learned from."""

from torch import Tensor


def noise(images: Tensor, prompts: list[str]) -> Tensor:
    """Return a number in [0, 1) for each image (B, 3, H, W), which tells nothing of the image."""
    # The digits of the mean after the seventh, which have nothing to do with what is shown.
    return images.double().mean((1, 2, 3)) * 1e7 % 1
