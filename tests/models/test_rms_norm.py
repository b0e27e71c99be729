"""Normalisation without a float32 copy: the results of diffusers, from fewer kept bytes."""

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from torch import nn

from flowalign.models.rms_norm import FrozenRMSNorm, replace_norms
from tests.models.test_adapted_linear import distance, kept_bytes
from tests.tiny import make_policy

HALVES = [torch.bfloat16, torch.float16]


def norm(dtype, affine=True, weight=None):
    layer = RMSNorm(16, 1e-6, elementwise_affine=affine)
    if affine:
        layer.weight.data.normal_(generator=torch.Generator().manual_seed(0))
        layer.weight.requires_grad_(False)
    return layer.to(weight or dtype)


def rows(dtype):
    return torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


def output_and_gradient(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    generator = torch.Generator().manual_seed(2)
    y.backward(torch.randn(y.shape, generator=generator).to(y.dtype))
    return y.detach(), x.grad


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_results_are_those_of_diffusers_and_gradients_no_less_exact(dtype, affine):
    layer, x = norm(dtype, affine), rows(dtype)
    y, grad = output_and_gradient(layer, x)
    y_frozen, grad_frozen = output_and_gradient(FrozenRMSNorm(layer), x)
    assert torch.equal(y_frozen, y)
    assert grad_frozen.dtype == dtype
    _, exact = output_and_gradient(layer.float(), x.float())
    assert 0 < distance(grad_frozen, exact) <= distance(grad, exact)


@pytest.mark.parametrize(
    ("dtype", "weight"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)]
)
def test_other_dtypes_have_the_results_and_gradients_of_diffusers(dtype, weight):
    layer, x = norm(dtype, weight=weight), rows(dtype)
    expected = output_and_gradient(layer, x)
    for value, theirs in zip(output_and_gradient(FrozenRMSNorm(layer), x), expected, strict=True):
        assert value.dtype == theirs.dtype
        assert torch.equal(value, theirs)


def test_the_input_is_kept_once_in_its_dtype():
    layer, x = norm(torch.bfloat16), rows(torch.bfloat16).requires_grad_()
    inverse = 3 * 5 * 4
    assert kept_bytes(layer, x) == x.nbytes + 2 * x.nbytes + inverse
    assert kept_bytes(FrozenRMSNorm(layer), x) == x.nbytes + inverse


def test_the_norms_of_a_network_are_replaced_and_keep_their_weights():
    network = nn.ModuleDict({"block": nn.ModuleDict({"norm_q": norm(torch.float32)})})
    state = {name: value.clone() for name, value in network.state_dict().items()}
    replace_norms(network)
    replaced = network["block"]["norm_q"]
    assert isinstance(replaced, FrozenRMSNorm)
    assert not replaced.weight.requires_grad
    assert network.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    modules = make_policy().model.transformer.modules()
    assert not [module for module in modules if type(module) is RMSNorm]
