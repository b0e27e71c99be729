"""`flowalign check`: shipped configurations pass, and code that is broken on purpose is caught."""

import logging
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from flowalign.batch import Keys
from flowalign.cli import main
from flowalign.config.load import load_config
from flowalign.diagnostics.check import adapter as adapter_check
from flowalign.diagnostics.check import check, report
from flowalign.diagnostics.check.arithmetic import describe_run, describe_step
from flowalign.diagnostics.check.probes import probe_inputs, row_by_row
from flowalign.diagnostics.check.quantized import compare_full_model
from flowalign.diagnostics.check.ratios import compiled_finding, ratio_finding
from flowalign.diagnostics.check.rewards import check_rewards
from flowalign.dynamics import Gaussian
from flowalign.errors import UserError
from flowalign.models import load_model
from flowalign.models.compiled import compile_blocks
from flowalign.models.flux import Flux
from flowalign.models.sd3 import SD3
from flowalign.objectives.crd import CRD
from flowalign.policy import Policy
from flowalign.rewards.inspection import Finding
from flowalign.runs import checkpoint
from flowalign.runs.adapter import save_adapter
from flowalign.training import preflight, setup
from flowalign.training.preflight import preflight_findings
from flowalign.training.trainer import train
from tests.tiny import ROOT, SMALL, small_config

SUBJECTS = (
    *("step", "disk", "schedule", "noise", "optimizer"),
    *("sampler", "reference", "gradient", "update", "adapter"),
)
GRPO = ["objective.kl_weight=0.1", "train.ema.decay=0.5"]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def run_check(name, folder, *overrides):
    """Return whether nothing is wrong, and the printed text."""
    lines = []
    config = load_config(f"configs/tiny/{name}.yaml", [*overrides, f"output={folder}"])
    return check(config, lines.append), "\n".join(lines)


def wrong_lines(text):
    return [line for line in text.splitlines() if line.startswith("!")]


@pytest.mark.parametrize(
    "name",
    [
        "flow_grpo",
        "crd",
        "kto",
        "flow_grpo_flux",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("dpo_online", "draft_lv")),
    ],
)
def test_nothing_is_wrong_with_shipped_configurations(name, tmp_path):
    fine, text = run_check(name, tmp_path / "run")
    assert fine, text
    assert not wrong_lines(text)
    for subject in SUBJECTS:
        assert f"  {subject}:" in text, subject
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param("flow_grpo", "float16", marks=pytest.mark.slow),
        ("flow_grpo", "bfloat16"),
        pytest.param("crd", "bfloat16", marks=pytest.mark.slow),
        pytest.param("flow_grpo_flux", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_rounding_to_half_precision_is_not_a_lost_matrix(name, dtype, tmp_path):
    # The ODE of crd has no stochastic steps for a window.
    window = ["sampler.window.range=[0, 0]"] if name == "crd" else []
    fine, text = run_check(name, tmp_path / "run", *SMALL, *window, f"model.dtype={dtype}")
    assert fine, text
    assert f"diffusers loads the saved adapter, in {dtype}, with an error of 0" in text


def test_the_distance_of_quantised_weights_is_that_of_the_velocities(tmp_path):
    """Besides, the adapter fits, ratios are 1 and KL is 0 as with full weights."""
    fine, text = run_check("flow_grpo", tmp_path / "run", *SMALL, *GRPO, "model.quantize=nf4")
    assert fine, text
    assert "kl:           0 before the first update" in text
    assert "equal to what a run begins with bit for bit: reference, ema" in text
    config = small_config(tmp_path / "run", "model.quantize=nf4")
    rounded, whole = load_model(config.model), load_model(replace(config.model, quantize="none"))
    probe = probe_inputs(rounded, setup.read_inputs(config))
    with torch.no_grad():
        bare, full = (row_by_row(model, probe) for model in (rounded, whole))
    distance = ((bare - full).norm() / full.norm()).item()
    assert 0.01 < distance < 0.1
    assert f"nf4 changes velocities by {distance:.2%}, given the same embeddings" in text


def test_velocities_that_rounding_cannot_explain_are_wrong(tmp_path):
    config = small_config(tmp_path / "run", "model.quantize=int8")
    model = load_model(config.model)
    probe = probe_inputs(model, setup.read_inputs(config))
    with torch.no_grad():
        bare = row_by_row(model, probe)
    wrong = [[f.wrong for f in compare_full_model(model, sign * bare, probe)] for sign in (1, -1)]
    assert wrong == [[False], [True]]
    model.config.quantize = "none"
    assert not list(compare_full_model(model, bare, probe))


def test_passes_of_one_image_do_not_change_the_reference(tmp_path):
    fine, text = run_check("flow_grpo", tmp_path / "run", *SMALL, *GRPO, "train.images_per_pass=1")
    assert fine, text
    assert "kl:           0 before the first update" in text
    assert "equal to what a run begins with bit for bit: reference, ema" in text


def test_no_pass_is_larger_than_those_of_the_run(monkeypatch, tmp_path):
    sizes, velocity = [], SD3.velocity

    def recorded(self, x, t, cond):
        sizes.append(len(x))
        return velocity(self, x, t, cond)

    monkeypatch.setattr(SD3, "velocity", recorded)
    fine, text = run_check("flow_grpo", tmp_path / "run", *SMALL, *GRPO, "train.images_per_pass=3")
    assert fine, text
    assert max(sizes) == 3


UNSCORED = """
def never(images, prompts, metadata):
    return [None] * len(images)


def of_squares(images, prompts, metadata):
    return [0.5 if "square" in prompt else None for prompt in prompts]
"""


def test_a_reward_that_scores_nothing_is_wrong_and_one_for_other_prompts_is_not(tmp_path):
    (tmp_path / "unscored.py").write_text(UNSCORED)
    (tmp_path / "prompts.txt").write_text("a red circle\na blue circle\na red square\n")
    names = [f"{tmp_path}/unscored.py:{name}" for name in ("never", "of_squares")]
    config = small_config(
        tmp_path / "run",
        f"rewards={{{', '.join(f'{name}: 1.0' for name in names)}}}",
        f"data.prompts={tmp_path}/prompts.txt",
        f"evaluation={{prompts: {tmp_path}/prompts.txt, rewards: {{{names[0]}: 1.0}}}}",
    )
    assembly = setup.assemble(setup.read_inputs(config), load_model(config.model))
    wrong = {finding.text.partition(":")[0]: finding for finding in check_rewards(assembly)}
    assert wrong["never"].wrong
    assert "scores no image, whatever the prompt" in wrong["never"].text
    assert not wrong["of_squares"].wrong


ONLINE = "4 prompts × 4 images = 16 images"


@pytest.mark.parametrize(
    ("images_per_pass", "name", "overrides", "texts"),
    [
        (1, "flow_grpo", [], (ONLINE, "8 images", "32 images; each prompt")),
        (2, "draft_lv", [], (ONLINE, "8 images", "32 images; each prompt")),
        (
            2,
            "dpo_online",
            ["data.ranking.top=2"],
            (
                f"{ONLINE}, ranked into at most 16 pairs",
                "at most 8 pairs",
                "32 images; each prompt",
            ),
        ),
        (1, "dpo", ["train.images_per_prompt=1"], ("4 pairs", "2 pairs", "8 pairs; each pair")),
        (
            2,
            "sft",
            ["train.images_per_prompt=1"],
            ("4 pictures", "2 pictures", "8 pictures; each picture"),
        ),
    ],
)
def test_the_arithmetic_is_that_of_the_run(images_per_pass, name, overrides, texts):
    counts = [
        "train.steps=2",
        "train.prompts_per_step=4",
        "train.images_per_prompt=4",
        "train.updates_per_step=2",
        f"train.images_per_pass={images_per_pass}",
    ]
    config = load_config(f"configs/tiny/{name}.yaml", [*counts, *overrides])
    inputs = setup.read_inputs(config)
    assembly = setup.assemble(inputs, load_model(config.model))
    batch, _ = assembly.source(0)
    rows = batch.pieces(len(batch) // config.train.updates_per_step)[0]
    passes = len(rows.pieces(rows.rows_per_pass(images_per_pass)))
    total, update, whole = texts
    most = "at most " if name == "dpo_online" else ""
    assert update == f"{most}{len(rows)} {update.split()[-1]}"
    split = f"2 update(s) of {update} on each of 1 process(es), in {most}{passes} pass(es)"
    assert describe_step(inputs).text == f"{total}; {split}"
    assert describe_run(inputs).text.startswith(f"2 steps, {whole} is used ")


def test_only_the_main_process_prints(monkeypatch):
    finding = Finding("schedule", "does not fall", wrong=True)
    monkeypatch.setattr(report, "findings", lambda config: [finding])
    lines = []
    assert not check(None, lines.append)
    assert len(lines) == 2
    monkeypatch.setattr(report.distributed, "is_main", lambda: False)
    assert not check(None, lines.append)
    assert len(lines) == 2


def test_the_command_prints_the_arithmetic_and_the_ratios(tmp_path, capsys):
    overrides = [*SMALL, *GRPO, f"output={tmp_path}/run"]
    assert main(["check", "configs/tiny/flow_grpo.yaml", *overrides]) == 0
    text = capsys.readouterr().out
    split = "1 update(s) of 6 images on each of 1 process(es), in 1 pass(es)"
    assert f"2 prompts × 3 images = 6 images; {split}" in text
    assert "log-ratios before the first update, step by step, in float32: " in text
    assert "kl:           0 before the first update" in text
    assert "Nothing wrong was found." in text


def kl_without_gradient(monkeypatch):
    exact = Gaussian.kl
    monkeypatch.setattr(Gaussian, "kl", lambda self, other: exact(self, other).detach())
    monkeypatch.setattr(CRD, "penalty", torch.no_grad()(CRD.penalty))


def schedule_off_by_one(monkeypatch):
    step = Policy.step

    def late(self, x, k, cond, stochastic=True):
        view = self.at(self.weights)
        view._gradient, view.times = self._gradient, [*self.times[1:], 0.0]
        return step(view, x, k, cond, stochastic)

    monkeypatch.setattr(Policy, "step", late)


def times_off_by_one(monkeypatch):
    times = SD3.schedule
    monkeypatch.setattr(SD3, "schedule", lambda self, steps: [*times(self, steps)[1:], 0.0])


def noise_shared_across_prompts(monkeypatch):
    seeds = Keys.seeds

    def shared(self, purpose):
        return seeds(replace(self, prompt=torch.zeros_like(self.prompt)), purpose)

    monkeypatch.setattr(Keys, "seeds", shared)


def noise_the_same_in_every_step(monkeypatch):
    seeds = Keys.seeds

    def same(self, purpose):
        return seeds(replace(self, step=torch.zeros_like(self.step)), purpose)

    monkeypatch.setattr(Keys, "seeds", same)


def adapter_left_on_in_the_reference(monkeypatch):
    at = Policy.at
    monkeypatch.setattr(
        Policy, "at", lambda self, name: at(self, "policy" if name == "reference" else name)
    )


def alpha_lost_on_saving(monkeypatch):
    def save(policy, folder, name="policy"):
        layers = {key: value.contiguous() for key, value in policy.state(name).items()}
        policy.model.pipeline_class().save_lora_weights(folder, transformer_lora_layers=layers)

    monkeypatch.setattr(checkpoint, "save_adapter", save)
    monkeypatch.setattr(adapter_check, "save_adapter", save)


def matrices_lost_on_saving(monkeypatch):
    def save(policy, folder, name="policy"):
        kept = dict(list(policy.state(name).items())[:-2])
        monkeypatch.setattr(Policy, "state", lambda self, name="policy": kept)
        exact(policy, folder, name)

    exact = save_adapter
    monkeypatch.setattr(adapter_check, "save_adapter", save)


def optimiser_of_the_wrong_adapter(monkeypatch):
    def wrong(policy, train):
        return torch.optim.AdamW(policy.parameters("ema"), lr=train.learning_rate)

    monkeypatch.setattr(setup, "make_optimizer", wrong)


def sampler_with_the_wrong_drift(monkeypatch):
    def dynamics(x, v, t, s, eta=0.7):
        variance = eta**2 * t / (1 - (s if t == 1 else t))
        return Gaussian(
            x + (s - t) * (v + variance / (2 * t) * (x - (1 - t) * v)),
            std=math.sqrt(variance * (t - s)),
        )

    build = setup.read_inputs

    def inputs(config):
        config.sampler.dynamics = partial(dynamics, eta=0.7)
        return build(config)

    monkeypatch.setattr(report, "read_inputs", inputs)


def frozen_matrices(monkeypatch):
    begin = Policy.__init__

    def frozen(self, *arguments, **settings):
        begin(self, *arguments, **settings)
        self.parameters()[0].requires_grad_(False)

    monkeypatch.setattr(Policy, "__init__", frozen)


def base_weights_that_train(monkeypatch):
    begin = Policy.__init__

    def thawed(self, *arguments, **settings):
        begin(self, *arguments, **settings)
        next(iter(self.model.transformer.parameters())).requires_grad_(True)

    monkeypatch.setattr(Policy, "__init__", thawed)


def log_probabilities_of_another_step(monkeypatch):
    log_prob = Gaussian.log_prob
    monkeypatch.setattr(
        Gaussian,
        "log_prob",
        lambda self, x: log_prob(self, x) + (0.5 if self.mean.requires_grad else 0),
    )


@pytest.mark.parametrize(
    ("broken", "subject"),
    [
        (kl_without_gradient, "kl gradient"),
        (schedule_off_by_one, "sampler"),
        (times_off_by_one, "schedule"),
        (noise_shared_across_prompts, "noise"),
        pytest.param(noise_the_same_in_every_step, "noise", marks=pytest.mark.slow),
        (adapter_left_on_in_the_reference, "reference"),
        (alpha_lost_on_saving, "adapter"),
        pytest.param(matrices_lost_on_saving, "adapter", marks=pytest.mark.slow),
        pytest.param(optimiser_of_the_wrong_adapter, "optimizer", marks=pytest.mark.slow),
        (optimiser_of_the_wrong_adapter, "update"),
        (sampler_with_the_wrong_drift, "marginals"),
        pytest.param(frozen_matrices, "optimizer", marks=pytest.mark.slow),
        (base_weights_that_train, "gradient"),
        (log_probabilities_of_another_step, "ratio"),
    ],
)
def test_broken_code_is_caught(broken, subject, monkeypatch, tmp_path):
    broken(monkeypatch)
    fine, text = run_check("flow_grpo", tmp_path / "run", *SMALL, *GRPO)
    assert not fine
    assert [line for line in wrong_lines(text) if line.startswith(f"! {subject}:")], text
    assert subject in text.splitlines()[-1]


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        pytest.param(
            alpha_lost_on_saving, "its scale is 1.0 instead of 2.0", marks=pytest.mark.slow
        ),
        (matrices_lost_on_saving, "2 of 78 matrices were lost"),
    ],
)
def test_losses_on_saving_are_caught_in_half_precision(broken, words, monkeypatch, tmp_path):
    broken(monkeypatch)
    fine, text = run_check("flow_grpo", tmp_path / "run", *SMALL, *GRPO, "model.dtype=bfloat16")
    assert not fine
    assert words in wrong_lines(text)[0]
    assert text.endswith("Wrong: adapter.")


def test_a_kl_without_gradient_is_caught_on_the_forward_process(monkeypatch, tmp_path):
    kl_without_gradient(monkeypatch)
    assert "! kl gradient:  kl has no gradient" in run_check("crd", tmp_path / "run")[1]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("flow_grpo", "train.seed=1"),
        pytest.param("ddpo", "objective.estimator=importance_sampling", marks=pytest.mark.slow),
        pytest.param("prdp", "data.ranking.top=1", marks=pytest.mark.slow),
    ],
)
def test_the_noise_of_log_ratios_is_compared_with_the_clip_range(name, more, tmp_path):
    text = run_check(name, tmp_path / "run", *SMALL, more, "objective.clip_range=1e-20")[1]
    (line,) = [line for line in text.splitlines() if line[2:].startswith("ratio:")]
    noise = max(
        float(number) for number in line.partition("float32: ")[2].partition(";")[0].split(", ")
    )
    assert "clipped beyond 1e-20" in line
    assert ("Set objective.clip_range to " in line) == line.startswith("!") == (noise > 0)


def test_a_clip_range_below_the_noise_is_reported_with_a_better_one():
    finding = ratio_finding([2e-5, 3e-5], 1e-5, "bfloat16")
    assert finding.wrong
    assert finding.text.endswith(
        "below their noise. Set objective.clip_range to 3e-04 or model.dtype to float32."
    )
    assert not ratio_finding([2e-7, 3e-7], 1e-5, "float32").wrong


def test_what_compiled_graphs_add_is_held_against_the_clip_range():
    assert not compiled_finding(0.0, 1e-6).wrong
    assert not compiled_finding(1e-7, 1e-6).wrong
    finding = compiled_finding(2e-7, 1e-6)
    assert finding.wrong
    assert finding.text.endswith(
        "a large part of the clip range 1e-06. Set model.compile to false."
    )
    assert not compiled_finding(1e-3, math.inf).wrong


@pytest.fixture
def eager_compiler(monkeypatch):
    """PyTorch's compiler without code of its own: graphs are traced, which takes less time."""
    torch.compiler.reset()
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    monkeypatch.setattr(compile_blocks, "__defaults__", ("eager",))


COMPILED = ["model.compile=true", "model.lora.targets=[attn.to_q]"]


@pytest.mark.slow
def test_nothing_is_wrong_with_compiled_blocks(eager_compiler, tmp_path):
    fine, text = run_check("flow_grpo", tmp_path / "run", *SMALL, *GRPO, *COMPILED)
    assert fine, text
    assert "graphs with and without a gradient differ by 0 in log-ratios" in text
    assert "equal to what a run begins with bit for bit: reference, ema" in text


@pytest.mark.slow
def test_graphs_that_differ_with_a_gradient_are_caught(eager_compiler, monkeypatch, tmp_path):
    def rounding(graph, inputs):
        def run(*values):
            results = graph(*values)
            return [value * 1.001 for value in results] if differs else results

        differs = torch.is_grad_enabled()
        return run

    monkeypatch.setattr(compile_blocks, "__defaults__", (rounding,))
    fine, text = run_check("flow_grpo", tmp_path / "run", *SMALL, *COMPILED)
    assert not fine
    assert "! compile:" in text
    assert "Set model.compile to false." in text


def test_a_random_reward_is_caught(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import random\n\n"
        "def dice(images, prompts, metadata):\n"
        "    return [random.random() for _ in images]\n"
    )
    fine, text = run_check(
        "flow_grpo",
        tmp_path / "run",
        *SMALL,
        f'rewards={{"{tmp_path}/mine.py:dice": 1.0}}',
        "evaluation.rewards={}",
    )
    assert not fine
    assert "in a second call, scores differ" in "\n".join(wrong_lines(text))
    assert text.endswith("Wrong: reward.")


def test_a_full_disk_is_reported_before_training(monkeypatch, tmp_path):
    usage = SimpleNamespace(free=10_000)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: usage)
    message = r"disk: a checkpoint has .*0\.01 MB are free\. Make room or choose output=FOLDER"
    with pytest.raises(UserError, match=message):
        train(small_config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("objective", "key"),
    [("{name: crd}", "objective.kl.guidance is 4.5"), ("{name: crd, kl: {guidance: 1}}", None)],
)
def test_a_model_with_distilled_guidance_is_not_guided_again(objective, key, monkeypatch, tmp_path):
    overrides = [
        f"objective={objective}",
        "sampler.dynamics.name=ode",
        "train.steps=1",
        f"output={tmp_path / 'run'}",
    ]
    config = load_config(
        "configs/tiny/flow_grpo_flux.yaml", [*SMALL, "sampler.window.range=[0, 0]", *overrides]
    )
    assert not Flux(config.model).has_distilled_guidance
    monkeypatch.setattr(Flux, "has_distilled_guidance", property(lambda _: True))
    assembly = setup.assemble(setup.read_inputs(config), load_model(config.model))
    findings = preflight_findings(assembly)
    wrong = [f"{finding.subject}: {finding.text}" for finding in findings if finding.wrong]
    cause = "but guidance is distilled into this model and set by sampler.embedded_guidance: 3.5"
    message = f"guidance: {key}, {cause}. Set objective.kl.guidance to 1."
    assert wrong == ([message] if key else [])


def test_training_runs_the_preflight_checks(monkeypatch, tmp_path):
    times_off_by_one(monkeypatch)
    with pytest.raises(UserError, match=r"schedule: .*does not fall from 1 to 0"):
        train(small_config(tmp_path / "run"))
