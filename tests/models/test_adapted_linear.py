"""Adapted layers: PEFT's results in float32, and no less exact ones from fewer bytes in half."""

import pytest
import torch
from peft import inject_adapter_in_model, LoraConfig
from peft.tuners.lora import Linear
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from flowalign.models.adapted_linear import AdaptedLinear, low_rank
from tests.tiny import kept_storages, make_policy, stir, TEXTS


class Attention(nn.Module):
    """Three layers of one input, as in an attention block."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(24, 24) for _ in "qkv")

    def forward(self, x):
        return self.q(x).sigmoid() * self.k(x) + self.v(x)


def adapted(layer, dtype=torch.float32):
    """The block with adapters of float32 on a base of this dtype; the same numbers every time."""
    torch.manual_seed(0)
    block = Attention().to(dtype)
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=["q", "k", "v"])
    lora._register_custom_module({nn.Linear: layer})
    inject_adapter_in_model(lora, block, "policy")
    for name, parameter in block.named_parameters():
        parameter.requires_grad_("lora" in name)
        if "lora" in name:
            parameter.data = torch.randn(parameter.shape) / 4
    return block


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (2, 1, 3, 24)])
def test_the_product_and_its_gradients_in_float32_are_those_of_two_layers(shape):
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(size, generator=generator) for size in (shape, (4, 24), (12, 4))]
    weight = torch.randn(*shape[:-1], 12, generator=generator)
    results = []
    for product in (low_rank, lambda x, a, b: F.linear(F.linear(x, a), b)):
        x, a, b = (tensor.clone().requires_grad_() for tensor in tensors)
        y = product(x, a, b)
        results.append([y, *torch.autograd.grad((y * weight).sum(), (x, a, b))])
    # Products of other shapes: some processors sum them in another order.
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_in_float32_the_layer_of_peft_computes(monkeypatch):
    """It is faster for small models, and there is nothing to save."""
    monkeypatch.setattr("flowalign.models.adapted_linear.low_rank", None)
    block = adapted(AdaptedLinear)
    assert block(torch.ones(2, 24)).shape == (2, 24)
    with pytest.raises(TypeError):
        adapted(AdaptedLinear, torch.bfloat16)(torch.ones(2, 24, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_as_exact_as_peft_s(dtype, monkeypatch):
    """Errors of the bundled model, whose adapter changes the velocity by 3 %.

    Rounding by chance makes one or the other 6 % smaller, depending on the processor.
    """
    exact = velocity_and_gradient(rounded(make_policy(), dtype))
    ours = velocity_and_gradient(make_policy(dtype=dtype))
    monkeypatch.setattr(AdaptedLinear, "forward", Linear.forward)
    peft = velocity_and_gradient(make_policy(dtype=dtype))
    for mine, theirs, value in zip(ours, peft, exact, strict=True):
        assert 0 < distance(mine, value) <= 1.1 * distance(theirs, value)


def rounded(policy, dtype):
    """A policy in float32 whose base has values of another dtype."""
    for name, parameter in policy.model.transformer.named_parameters():
        if "lora" not in name:
            parameter.data = parameter.data.to(getattr(torch, dtype)).float()
    return policy


def velocity_and_gradient(policy):
    """A velocity, and the gradient of its mean square to the adapter."""
    stir(policy)
    x = torch.randn(4, *policy.model.latent_shape, generator=torch.Generator().manual_seed(0))
    v = policy.velocity(x, torch.linspace(0.1, 0.9, 4), policy.encode([*TEXTS, *TEXTS]))
    v.square().mean().backward()
    return v.detach(), torch.cat([p.grad.flatten() for p in policy.parameters()])


def distance(value, exact):
    return ((value.float() - exact).norm() / exact.norm()).item()


def test_layers_of_one_input_keep_it_once_and_in_its_dtype():
    x = torch.randn(8, 16, 24, dtype=torch.bfloat16, requires_grad=True)
    kept = {
        layer: kept_bytes(adapted(layer, torch.bfloat16), x) for layer in (AdaptedLinear, Linear)
    }
    # x in half precision once, instead of three times in float32; and A x in half precision.
    rows, rank = 8 * 16, 4
    saved = 3 * rows * 24 * 4 - rows * 24 * 2 + 3 * rows * rank * 2
    assert kept[Linear] - kept[AdaptedLinear] == saved


def kept_bytes(block, x):
    """The bytes of activations that the backward pass needs, each storage once."""
    with kept_storages(block.parameters()) as storages:
        y = block(x)
    assert y.requires_grad
    return sum(storages.values())
