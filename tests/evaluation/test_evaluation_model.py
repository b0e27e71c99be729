"""Training one model, and evaluating the adapter on another one, such as a distilled one."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowalign import api
from flowalign.diagnostics.check.report import check
from flowalign.diagnostics.rehearsal import rehearse
from flowalign.errors import UserError
from flowalign.evaluation.results import EvaluationResult
from flowalign.labelling.label import find_origin
from flowalign.models import load_model
from flowalign.policy import Policy, Sampler
from flowalign.runs.adapter_card import adapter_card, model_card
from flowalign.runs.comparable import read_run, refuse_other_evaluation
from flowalign.runs.folder import AFTER, BEFORE
from flowalign.sampling.sources import find_source
from flowalign.training.setup import assemble, load, read_inputs
from flowalign.training.trainer import train
from tests.tiny import random_flux2, ROOT, small_config, stir

DISTILLED = "assets/tiny-sd3-2step"
ON_DISTILLED = [f"evaluation.model={DISTILLED}", "evaluation.sampler.steps=2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that trains the bundled model and is evaluated on the one of two steps."""
    folder = tmp_path_factory.mktemp("run")
    train(small_config(folder, *ON_DISTILLED, "train.learning_rate=1e-2"))
    return folder


def assembly_of(config):
    return assemble(read_inputs(config), load(config))


def test_a_stand_in_computes_with_its_own_weights_and_the_adapter_of_another_policy():
    models = [load_model(small_config("run", f"model.path={DISTILLED}").model) for _ in range(2)]
    sampler = Sampler(steps=2)
    trained, stand_in = (Policy(model, sampler) for model in models)
    stir(trained)
    x = torch.randn(1, *models[0].latent_shape, generator=torch.Generator().manual_seed(0))
    t, cond = torch.tensor([0.5]), trained.encode(["a red circle"])
    for weights in ("policy", "reference"):
        view = stand_in.with_adapter_of(trained.at(weights))
        assert torch.equal(view.velocity(x, t, cond), trained.at(weights).velocity(x, t, cond))
    both = [stand_in.at(weights).velocity(x, t, cond) for weights in ("policy", "reference")]
    assert not torch.equal(*both)


def test_the_base_of_a_run_is_the_evaluated_model(run, tmp_path):
    own = small_config(tmp_path, f"model.path={DISTILLED}", "evaluation.sampler.steps=2")
    assembly = assembly_of(own)
    view = assembly.policy.at("reference").sampling(own.evaluation_sampler)
    found = assembly.evaluator(view)
    before = EvaluationResult.load(run / BEFORE)
    assert torch.equal(before.images, found.images)
    assert torch.equal(before.rewards["scene_match"], found.rewards["scene_match"])


def test_a_run_is_evaluated_again_on_the_evaluated_model_with_the_adapter(run):
    after, before = EvaluationResult.load(run / AFTER), EvaluationResult.load(run / BEFORE)
    assert not torch.equal(after.images, before.images)
    again = api.evaluate(run)
    assert torch.equal(again.images, after.images)


def test_a_run_samples_from_the_evaluated_model_and_asks_for_votes_on_the_other(run):
    assert find_source(str(run)).model.path == DISTILLED
    assert find_origin(str(run), None).model.path == "assets/tiny-sd3"


def test_the_adapter_trains_as_it_does_without_another_model_in_evaluations(run, tmp_path):
    train(small_config(tmp_path, "train.learning_rate=1e-2"))
    file = "adapter/pytorch_lora_weights.safetensors"
    assert (run / file).read_bytes() == (tmp_path / file).read_bytes()


def test_the_readme_of_the_adapter_shows_the_evaluated_model(run):
    card = (run / "adapter" / "README.md").read_text()
    assert f'from_pretrained("{DISTILLED}"' in card.replace("'", '"')
    assert "num_inference_steps=2" in card
    assert "base_model: assets/tiny-sd3\n" in card
    assert adapter_card(small_config(run), run / "adapter") != card
    report = (run / "report.html").read_text()
    assert f"flow_grpo on assets/tiny-sd3, evaluated on {DISTILLED}" in report


def test_runs_are_compared_if_one_model_makes_their_pictures(run, tmp_path):
    on_base, on_distilled = (read_run(tmp_path / name) for name in trained_elsewhere(tmp_path))
    refuse_other_evaluation(read_run(run), on_distilled)
    with pytest.raises(UserError, match=r"the model without an adapter makes other pictures"):
        refuse_other_evaluation(read_run(run), on_base)


def trained_elsewhere(folder: Path) -> list[str]:
    """Runs on the bundled model and on that of two steps, which evaluate on what they train."""
    paths = {"base": "assets/tiny-sd3", "distilled": DISTILLED}
    for name, path in paths.items():
        settings = [f"model.path={path}", "evaluation.sampler.steps=2", "train.steps=1"]
        train(small_config(folder / name, *settings))
    return [*paths]


def test_a_plan_counts_the_weights_of_both_models():
    alone, both = (rehearse(small_config("run", *extra)) for extra in ([], ON_DISTILLED))
    networks = alone.weights["transformer"] + alone.weights["vae"]
    assert both.stand_in == networks
    more = {phase: both.peaks[phase] - alone.peaks[phase] for phase in alone.peaks}
    adapter = alone.adapters // 2  # the policy and its moving average
    assert set(more.values()) == {networks + adapter}


def test_another_family_or_size_is_refused():
    with pytest.raises(UserError, match=r"assets/tiny-flux is a flux, but model\.path is a sd3"):
        assembly_of(small_config("run", "evaluation.model=assets/tiny-flux"))
    with pytest.raises(UserError, match=r"evaluation\.model: there is no folder"):
        assembly_of(small_config("run", "evaluation.model=./nothing"))
    with pytest.raises(UserError, match=r"^evaluation\.model: there is no folder"):
        rehearse(small_config("run", "evaluation.model=./nothing"))


def test_a_merged_export_has_the_licence_of_the_model_that_it_holds(tmp_path):
    for name, licence in (("base", "apache-2.0"), ("distilled", "mit")):
        shutil.copytree(ROOT / "assets" / "tiny-sd3-2step", tmp_path / name)
        (tmp_path / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    models = f"model.path={tmp_path / 'base'}", f"evaluation.model={tmp_path / 'distilled'}"
    config = small_config(tmp_path / "run", *models)
    assert "license: apache-2.0" in adapter_card(config, tmp_path)
    assert "license: mit" in model_card(config, tmp_path)


def test_a_model_of_few_steps_is_not_guided(tmp_path, capsys):
    base = random_flux2(tmp_path / "base")
    distilled = random_flux2(tmp_path / "distilled", is_distilled=True)
    model = replace(base.config)
    about = f"{{name: {model.name}, path: {model.path}, height: 64, width: 64}}"
    settings = [
        f"model={about}",
        f"model.max_sequence_length={model.max_sequence_length}",
        f"evaluation.model={distilled.config.path}",
        "rewards={brightness: 1.0}",
        "evaluation.rewards={brightness: 1.0}",
    ]
    for change, complaint in (
        ("evaluation.sampler.guidance=1", ""),
        ("evaluation.sampler.guidance=4", "evaluation.sampler.guidance is 4, but the model is"),
        ("evaluation.guidance_sweep=[2, 3]", "evaluation.guidance_sweep tries 3, but the model is"),
    ):
        assert check(small_config(tmp_path / "run", *settings, change)) == (not complaint)
        assert complaint in capsys.readouterr().out
