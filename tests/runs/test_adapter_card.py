"""The README of an adapter: whatever the user named, its code is code and its text is text."""

import shutil
from dataclasses import replace

import pytest

from flowalign.cli import main
from flowalign.runs.adapter_card import adapter_card, base_model, CARD
from tests.hostile import assert_harmless, calls, NAMES, read_card
from tests.tiny import ROOT, SMALL, small_config, TINY


def config_with(tmp_path, name):
    """A configuration whose model, prompt and output are called so."""
    model = tmp_path / "models" / name
    model.mkdir(parents=True)
    shutil.copy(ROOT / "assets" / "tiny-sd3" / "model_index.json", model)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a red circle"}\n')
    config = small_config(tmp_path / "run", f"evaluation.prompts={tmp_path}/prompts.jsonl")
    return replace(config, model=replace(config.model, path=str(model)))


@pytest.mark.parametrize("name", NAMES)
def test_names_stay_literals_in_the_code_of_a_card(name, tmp_path, monkeypatch):
    config = config_with(tmp_path, name)
    monkeypatch.setattr("flowalign.runs.adapter_card._first_prompt", lambda _: name)
    (tmp_path / CARD).write_text(adapter_card(config, tmp_path / name / "adapter"))
    page, code = read_card((tmp_path / CARD).read_text())
    arguments = calls(code)
    assert set(arguments) == {"from_pretrained", "load_lora_weights", "pipe", "save"}
    assert arguments["from_pretrained"] == [config.model.path]
    assert arguments["load_lora_weights"] == [str(tmp_path / name / "adapter")]
    assert arguments["pipe"] == [name]
    assert "A LoRA adapter for" in page.text
    assert base_model(tmp_path) == config.model.path


@pytest.mark.parametrize("name", NAMES)
def test_names_stay_text_in_the_card_of_a_family_without_a_pipeline(name, tmp_path, monkeypatch):
    config = config_with(tmp_path, name)
    family = type("Family", (), {"pipeline_call": staticmethod(lambda *_: None)})
    monkeypatch.setattr("flowalign.runs.adapter_card.family_of", lambda _: family)
    config = replace(config, model=replace(config.model, name=name))
    page, code = read_card(adapter_card(config, tmp_path / name))
    assert code == ""
    assert page.text.count("".join(c if c.isprintable() else repr(c)[1:-1] for c in name)) >= 2


def test_a_run_of_hostile_names_ends_with_harmless_files(tmp_path, monkeypatch):
    folder = tmp_path / NAMES[2] / NAMES[0]
    reward = f"$\\frac{{$ {NAMES[4]}"
    rewards = f"{{'{reward}': {{reward: brightness}}}}"
    stop = f"train.stop={{'eval/{reward}': {{below: 10.0}}}}"
    settings = [f"rewards={rewards}", f"evaluation.rewards={rewards}", stop]
    steps = ["train.evaluate_every=1", "sampler.steps=2", "sampler.window.range=[0, 1]"]
    quoted = str(folder).replace("'", "''")
    monkeypatch.chdir(ROOT)
    assert main(["train", str(TINY), *SMALL, *settings, *steps, f"output='{quoted}'"]) == 0
    page = assert_harmless((folder / "report.html").read_text(encoding="utf-8"))
    assert f"{reward}: " in page.text
    card, code = read_card((folder / "adapter" / CARD).read_text(encoding="utf-8"))
    assert calls(code)["load_lora_weights"] == [str(folder / "adapter")]
    assert f"| {reward} | " in card.text
