"""Frozen linear layers: exact where codes allow it, within stated bounds elsewhere, fewer bytes."""

import pytest
import torch
from torch import nn

from flowalign.models import load_model
from flowalign.models.frozen_linear import (
    BLOCK,
    freeze_linears,
    FrozenLinear,
    NF4,
    parameter_count,
)
from flowalign.runs.adapter import save_adapter
from tests.tiny import kept_storages, make_policy, random_sd35, sd3_config, stir, TEXTS

EIGHTH = torch.arange(8) / 8
FP8 = torch.cat([(1 + EIGHTH) * 2.0**power for power in range(-6, 9)])[:-1]
"""The positive numbers of float8_e4m3fn, from 2^-6 to 448."""
VALUES = {"int8": torch.arange(-127, 128), "fp8": torch.cat([FP8, -FP8]), "nf4": torch.tensor(NF4)}
BOUNDS = {"int8": 0.5 / 127, "fp8": 16 / 448, "nf4": (NF4[1] - NF4[0]) / 2}
"""Half the widest gap between two values, as a share of a block's largest weight."""
BITS = {"int8": 8, "fp8": 8, "nf4": 4}
QUANTIZE = sorted(BITS)


def linear(width, height=48, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(width, height).to(dtype).requires_grad_(False)


def same_numbers(layer):
    """A layer of PyTorch that holds the decoded weight."""
    plain = nn.Linear(layer.in_features, layer.out_features).requires_grad_(False)
    plain.weight.data, plain.bias.data = layer.weight, layer.bias
    return plain


@pytest.mark.parametrize("quantize", QUANTIZE)
def test_numbers_that_have_a_code_come_back_bit_for_bit(quantize):
    values = VALUES[quantize].float()
    layer = linear(BLOCK)
    for row in layer.weight.data:
        row.copy_(values[torch.randint(len(values), (BLOCK,))] / 64)
        row[0] = values.abs().max() / 64
    assert torch.equal(FrozenLinear(layer, quantize).weight, layer.weight)


@pytest.mark.parametrize("width", [BLOCK, 80, 21])
@pytest.mark.parametrize("quantize", QUANTIZE)
def test_no_weight_moves_by_more_than_half_a_gap(quantize, width):
    layer = linear(width)
    error = (FrozenLinear(layer, quantize).weight - layer.weight).abs().flatten()
    largest = torch.cat([b.abs().max().expand(len(b)) for b in layer.weight.flatten().split(BLOCK)])
    share = (error / largest).max()
    assert 0.5 * BOUNDS[quantize] < share < 1.001 * BOUNDS[quantize]


@pytest.mark.parametrize("quantize", QUANTIZE)
def test_a_block_of_zeros_stays_zero(quantize):
    layer = linear(BLOCK)
    layer.weight[3:5] = 0
    assert not FrozenLinear(layer, quantize).weight[3:5].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantize", QUANTIZE)
def test_a_layer_computes_with_its_decoded_weight_and_keeps_nothing(quantize, dtype):
    frozen = FrozenLinear(linear(BLOCK, dtype=dtype), quantize)
    plain = same_numbers(frozen)
    assert frozen.weight.dtype == dtype
    x = torch.randn(3, 5, BLOCK, dtype=dtype)
    results = []
    for layer in (frozen, plain):
        inputs = x.clone().requires_grad_()
        with kept_storages() as kept:
            y = layer(inputs)
        y.square().sum().backward()
        results.append((y, inputs.grad, sum(kept.values())))
    (y, gradient, kept), (plain_y, plain_gradient, plain_kept) = results
    assert torch.equal(y, plain_y)
    assert torch.equal(gradient, plain_gradient)
    assert (kept, plain_kept) == (0, plain.weight.nbytes)


@pytest.mark.parametrize("quantize", QUANTIZE)
def test_a_weight_takes_its_bits_and_a_share_of_a_scale(quantize):
    layer = linear(2 * BLOCK)
    frozen = FrozenLinear(layer, quantize)
    size = sum(buffer.nbytes for buffer in frozen.buffers())
    assert 8 * size / layer.weight.numel() == BITS[quantize] + 32 / BLOCK
    assert [name for name, _ in frozen.named_parameters()] == ["bias"]
    assert parameter_count(frozen) == parameter_count(layer)


@pytest.mark.parametrize("quantize", QUANTIZE)
def test_layers_of_blocks_are_frozen_and_embeddings_and_output_are_not(quantize):
    model = load_model(sd3_config(quantize=quantize))
    kinds = {name: type(m) for name, m in model.transformer.named_modules()}
    frozen = [name for name, kind in kinds.items() if kind is FrozenLinear]
    whole = [name for name, kind in kinds.items() if kind is nn.Linear]
    assert frozen
    assert all(name.startswith("transformer_blocks.") for name in frozen)
    assert not any(name.startswith("transformer_blocks.") for name in whole)
    assert {"proj_out", "context_embedder"} <= set(whole)
    encoder = model.networks()["text_encoder"]
    assert any(isinstance(module, FrozenLinear) for module in encoder.modules())


@pytest.mark.parametrize(("quantize", "bound"), [("int8", 0.01), ("fp8", 0.02), ("nf4", 0.06)])
def test_the_velocity_is_near_that_of_the_full_model(quantize, bound):
    full, frozen = (velocity(make_policy(**changes)) for changes in ({}, {"quantize": quantize}))
    assert 0.1 * bound < (frozen - full).norm() / full.norm() < bound


def velocity(policy, name="reference"):
    x = torch.randn(4, *policy.model.latent_shape, generator=torch.Generator().manual_seed(0))
    view = policy.at(name)
    return view.velocity(x, torch.linspace(0.1, 0.9, 4), view.encode([*TEXTS, *TEXTS]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_on_frozen_layers_compute_as_on_plain_layers_of_the_same_numbers(dtype):
    """Bit for bit: the adapter's start, its velocity, and its gradient through all layers."""
    results = []
    for plain in (False, True):
        policy = make_policy(dtype=dtype, quantize="nf4", gradient_checkpointing=True)
        if plain:
            replace_frozen(policy.model.transformer)
        assert torch.equal(velocity(policy, "policy"), velocity(policy))
        stir(policy)
        assert all(parameter.dtype == torch.float32 for parameter in policy.parameters())
        x = torch.randn(4, *policy.model.latent_shape, generator=torch.Generator().manual_seed(0))
        v = policy.velocity(x, torch.full((4,), 0.5), policy.encode([*TEXTS, *TEXTS]))
        v.square().mean().backward()
        results.append([v, *(parameter.grad for parameter in policy.parameters())])
    for frozen, plain in zip(*results, strict=True):
        assert torch.equal(frozen, plain)
    # The velocity, and the gradient of the first block's adapter, which passes through all others.
    assert all(value.any() for value in results[0][:3])


def replace_frozen(network):
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, FrozenLinear):
                setattr(parent, name, same_numbers(layer))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_an_adapter_trained_on_frozen_layers_loads_on_the_full_model(tmp_path):
    trained, full = make_policy(quantize="nf4"), make_policy()
    stir(trained)
    save_adapter(trained, tmp_path)
    full.model.load_adapter(tmp_path, "loaded")
    for ours, theirs in zip(trained.parameters(), full.parameters("loaded"), strict=True):
        assert torch.equal(ours, theirs)


def test_text_encoders_keep_the_precision_of_layers_that_need_it(tmp_path):
    """T5 asks its layers for their dtype, and one of them is float32 beside half precision."""
    random_sd35(tmp_path)
    rows = {}
    for quantize in ("none", "int8"):
        config = sd3_config(
            path=str(tmp_path), dtype="float16", max_sequence_length=16, quantize=quantize
        )
        model = load_model(config)
        feed_forward = model.networks()["text_encoder_3"].encoder.block[0].layer[-1].DenseReluDense
        assert feed_forward.wo.weight.dtype == torch.float32
        assert isinstance(feed_forward.wo, FrozenLinear) == (quantize != "none")
        rows[quantize] = model.encode_texts(["abc"])["embeds"].float()
    distance = (rows["int8"] - rows["none"]).norm() / rows["none"].norm()
    assert 0 < distance < 0.01


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_an_offloaded_layer_takes_no_memory_of_its_device_and_arrives_when_used(quantize):
    layer = FrozenLinear(linear(BLOCK), quantize)
    weight = layer.weight
    layer.stay(pin=False)
    assert sum(buffer.nbytes for buffer in layer.buffers()) == 0
    assert torch.equal(layer.weight, weight)
    # A copy: what a device frees after use must not be what stays in main memory.
    assert layer.weight.data_ptr() != layer.weight.data_ptr()
    assert layer.to("meta").weight.device.type == "meta"


@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16"}, {"quantize": "int8"}])
def test_offloading_changes_no_bit_of_velocities_and_gradients(changes):
    results, sizes = [], []
    for offload in (False, True):
        policy = make_policy(offload=offload, gradient_checkpointing=offload, **changes)
        stir(policy)
        x = torch.ones(4, *policy.model.latent_shape)
        loss = policy.velocity(x, torch.full((4,), 0.5), policy.encode([*TEXTS, *TEXTS])).sum()
        loss.backward()
        gradient = [parameter.grad for parameter in policy.parameters()]
        results.append([velocity(policy, "policy"), *gradient])
        sizes.append(device_bytes(policy.model.transformer.transformer_blocks))
    for stays, leaves in zip(*results, strict=True):
        assert torch.equal(stays, leaves)
    assert results[0][1].any()
    # Biases and norms stay.
    assert sizes[1] < 0.05 * sizes[0]


def device_bytes(network):
    """The bytes of a network on its device, without adapters."""
    parameters = [p for name, p in network.named_parameters() if "lora" not in name]
    return sum(tensor.nbytes for tensor in [*parameters, *network.buffers()])


def test_nothing_is_replaced_without_the_setting():
    network = nn.ModuleList([linear(BLOCK)])
    freeze_linears(network, "none", torch.device("cpu"))
    assert type(network[0]) is nn.Linear
