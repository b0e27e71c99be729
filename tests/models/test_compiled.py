"""Compiled blocks: one graph for each kind of call, and the results of uncompiled ones."""

import logging

import pytest
import torch

from flowalign.batch import Keys
from flowalign.data.prompts import Prompt
from flowalign.files import read_tensors
from flowalign.models import compiled, load_model
from flowalign.models.compiled import compile_blocks, uncompiled
from flowalign.models.config import Lora
from flowalign.models.families import describe
from flowalign.policy import Policy, Sampler
from flowalign.rollouts.collect import make_prompts
from flowalign.runs.checkpoint import checkpoints
from flowalign.settings.types import WrongSetting
from flowalign.training.trainer import train
from tests.tiny import make_policy, ROOT, sd3_config, small_config, stir, TEXTS

FEW, ALL = Lora(rank=4, alpha=12, targets=["attn.to_q"]), Lora(rank=4, alpha=12)
WEIGHTS = ("policy", "old", "ema", "reference")


@pytest.fixture(autouse=True)
def a_fresh_compiler(monkeypatch):
    """No graphs of other tests, and no records of what the compiler does, which take longer."""
    torch.compiler.reset()
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)


class Counting:
    """A compiler that computes each graph as it is, and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def moved_policy(**changes):
    """A policy whose adapters all differ, by default on few layers, which are compiled sooner."""
    policy = make_policy(snapshots=["old", "ema"], **{"lora": FEW, **changes})
    for number, name in enumerate(("policy", "old", "ema")):
        stir(policy, name, 0.02 * (number + 1))
    return policy


def call(policy, images, weights=WEIGHTS):
    """Velocities under all weights, then the policy's with a gradient, and that gradient."""
    cond = policy.encode((TEXTS * images)[:images])
    generator = torch.Generator().manual_seed(images)
    x = torch.randn(images, *policy.model.latent_shape, generator=generator)
    t = torch.linspace(0.3, 0.9, images)
    without = [policy.at(name).velocity(x, t, cond) for name in weights]
    v = policy.velocity(x, t, cond)
    return [*without, v.detach(), *torch.autograd.grad(v.square().sum(), policy.parameters())]


def equal(some, others):
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize(
    ("dtype", "lora"),
    [
        ("bfloat16", FEW),
        pytest.param("bfloat16", ALL, marks=pytest.mark.slow),
        pytest.param("float16", ALL, marks=pytest.mark.slow),
        pytest.param("float32", ALL, marks=pytest.mark.slow),
    ],
)
def test_each_kind_of_call_has_one_graph_and_the_results_of_uncompiled_blocks(dtype, lora):
    policy = moved_policy(dtype=dtype, lora=lora)
    expected = {images: call(policy, images) for images in (2, 3)}
    backend = Counting()
    compile_blocks(policy.model.blocks, backend)
    for round_ in range(3):
        assert equal(call(policy, 2), expected[2]), round_
        # The last block differs from the others, and with a gradient the first one does too: its
        # inputs have none.
        assert backend.graphs == 2 * len(WEIGHTS) + 3, round_
    assert equal(call(policy, 3), expected[3])
    assert backend.graphs == 2 * len(WEIGHTS) + 3


@pytest.mark.slow
def test_one_image_has_graphs_of_its_own_in_any_order():
    graphs = {}
    for order in ((1, 2, 3), (3, 2, 1)):
        torch.compiler.reset()
        policy, backend = moved_policy(), Counting()
        compile_blocks(policy.model.blocks, backend)
        for images in order:
            call(policy, images, ["reference"])
        graphs[order] = backend.graphs
    assert set(graphs.values()) == {2 * (2 + 3)}


def test_blocks_and_steps_that_are_computed_again_need_no_other_graphs():
    def gradient(policy):
        keys = Keys.training(0, 0, [(0, 0), (1, 0)])
        batch = make_prompts(policy, [Prompt(text) for text in TEXTS], keys)
        x0 = policy.unroll(policy.initial_noise(batch), batch, range(2))
        return torch.autograd.grad(x0.square().sum(), policy.parameters())

    policy = make_policy(Sampler(steps=2), gradient_checkpointing=True, lora=FEW)
    stir(policy)
    expected = gradient(policy)
    backend = Counting()
    compile_blocks(policy.model.blocks, backend)
    assert equal(gradient(policy), expected)
    # The first block, whose inputs have no gradient in the first step and one with a gradient in
    # the second; the last block; the others.
    assert backend.graphs == 4


@pytest.mark.slow
def test_both_kinds_of_blocks_of_flux_are_compiled():
    torch.manual_seed(0)
    policy = Policy(load_model(describe(str(ROOT / "assets" / "tiny-flux"))), Sampler(steps=2))
    stir(policy)
    expected = call(policy, 2, ["policy"])
    backend = Counting()
    compile_blocks(policy.model.blocks, backend)
    assert equal(call(policy, 2, ["policy"]), expected)
    # The first single block takes contiguous inputs, and the others slices. With a gradient, the
    # first double block differs too: its inputs have none.
    assert backend.graphs == 3 + 4


def test_a_compiler_that_fails_is_named_once_and_the_model_runs_without_it(capsys):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler")

    policy = moved_policy()
    expected = call(policy, 2)
    compile_blocks(policy.model.blocks, broken)
    assert equal(call(policy, 2), expected)
    text = capsys.readouterr().out
    assert text.count("runs uncompiled from here on") == 1
    assert "no C++ compiler" in text
    assert "model.compile to false" in text


def test_more_graphs_than_allowed_are_said_and_not_silent(capsys, monkeypatch):
    monkeypatch.setattr(compiled, "GRAPHS", 0)
    policy = moved_policy()
    expected = call(policy, 2)
    backend = Counting()
    with torch._dynamo.config.patch(recompile_limit=3):
        compile_blocks(policy.model.blocks, backend)
        assert equal(call(policy, 2), expected)
    assert backend.graphs == 3
    assert "recompile limit exceeded" in capsys.readouterr().out


def test_loading_compiles_without_renaming_a_parameter():
    plain, model = (load_model(sd3_config(compile=value)) for value in (False, True))
    names = [name for name, _ in model.transformer.named_parameters()]
    assert names == [name for name, _ in plain.transformer.named_parameters()]
    kinds = {type(block.forward) for block in model.blocks}
    assert kinds == {compiled._CompiledForward}
    assert torch._dynamo.config.recompile_limit >= compiled.GRAPHS


@pytest.mark.parametrize("change", [{"quantize": "int8"}, {"offload": True}])
def test_weights_that_are_stored_elsewhere_are_not_compiled(change):
    """The compiler may keep a decoded weight for the backward pass: 2 MB of the bundled model."""
    with pytest.raises(WrongSetting, match=r"compile is true[\s\S]*Set compile to false"):
        sd3_config(compile=True, **change)


def test_a_context_computes_without_the_compiler():
    policy, backend = moved_policy(), Counting()
    compile_blocks(policy.model.blocks, backend)
    with uncompiled():
        call(policy, 2)
    assert backend.graphs == 0
    call(policy, 2, ["policy"])
    assert backend.graphs


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 0.03)])
def test_graphs_with_and_without_a_gradient_agree_to_the_last_bit(dtype, bound):
    """PyTorch's own compiler. Against uncompiled blocks, it rounds sums in another order."""
    policy = moved_policy(dtype=dtype)
    expected = call(policy, 2, ["policy"])
    compile_blocks(policy.model.blocks)
    results = call(policy, 2, ["policy"])
    without, with_gradient, *_ = results
    assert torch.equal(without, with_gradient)
    for ours, theirs in zip(results, expected, strict=True):
        assert (ours - theirs).norm() <= bound * theirs.norm()


@pytest.mark.slow
def test_a_compiled_run_that_resumes_ends_as_one_that_never_stopped(tmp_path):
    few = ["model.compile=true", "model.lora.targets=[attn.to_q]"]
    for folder, stops in (("whole", (2,)), ("parts", (1, 2))):
        for steps in stops:
            torch.compiler.reset()
            train(small_config(tmp_path / folder, *few, f"train.steps={steps}"))
    whole, parts = (
        read_tensors(checkpoints(tmp_path / name)[-1] / "pytorch_lora_weights.safetensors")
        for name in ("whole", "parts")
    )
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
