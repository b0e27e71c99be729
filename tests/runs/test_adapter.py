"""The exported adapter: read by diffusers without this package, and at full strength by anyone."""

import os
import shutil
import sys

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from flowalign.cli import main
from flowalign.models.config import Lora
from flowalign.runs.adapter import (
    ADAPTER_FILE,
    export_weights,
    load_adapter,
    lora_settings,
    save_adapter,
)
from flowalign.training import trainer
from tests.processes import run_process
from tests.runs.damage import flip, STEPS
from tests.tiny import make_policy, ROOT, small_config, stir, two_groups

DIFFUSERS_ALONE = """
import sys
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

adapter, noise, pictures, *prompts = sys.argv[1:]
pipe = StableDiffusion3Pipeline.from_pretrained(
    "assets/tiny-sd3", text_encoder_3=None, tokenizer_3=None
)
pipe.load_lora_weights(adapter)
images = pipe(
    prompts,
    latents=load_file(noise)["noise"],
    num_inference_steps=4,
    guidance_scale=1.0,
    height=64,
    width=64,
    max_sequence_length=0,
    output_type="pt",
).images
save_file({"images": images}, pictures)
assert "flowalign" not in sys.modules
"""


def test_diffusers_alone_makes_our_pictures_from_the_adapter(tmp_path):
    policy = make_policy()
    stir(policy)
    save_adapter(policy, tmp_path / "adapter")
    batch = two_groups(policy, 1)
    save_file({"noise": policy.initial_noise(batch)}, tmp_path / "noise.safetensors")
    files = [
        str(tmp_path / name) for name in ("adapter", "noise.safetensors", "images.safetensors")
    ]
    run_process([sys.executable, "-c", DIFFUSERS_ALONE, *files, *batch.prompts])
    images = load_file(tmp_path / "images.safetensors")["images"]
    ours = policy.decode(policy.at("policy").generate(batch).x0)
    assert (ours - images).abs().max() <= 1e-4


def test_the_lines_of_the_adapters_readme_run(tmp_path):
    trainer.train(small_config(tmp_path / "run", "train.steps=1"))
    readme = (tmp_path / "run" / "adapter" / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    run_process([sys.executable, "-c", code.replace("picture.png", str(tmp_path / "picture.png"))])
    assert (tmp_path / "picture.png").exists()


def made_by_diffusers(adapter, batch, noise, model=ROOT / "assets" / "tiny-sd3"):
    """Pictures of an adapter, if any, in a pipeline that has loaded nothing else."""
    pipe = StableDiffusion3Pipeline.from_pretrained(model, text_encoder_3=None, tokenizer_3=None)
    if adapter:
        pipe.load_lora_weights(adapter)
    size = {"height": 64, "width": 64, "max_sequence_length": 0}
    settings = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "pt", **size}
    return pipe(batch.prompts, latents=noise.clone(), **settings).images


def test_an_exported_adapter_has_full_strength_with_metadata_and_without(tmp_path):
    policy = make_policy()  # alpha / rank is 3
    stir(policy)
    save_adapter(policy, tmp_path / "trained")
    export_weights(tmp_path / "trained", tmp_path / "exported")
    tensors = load_file(tmp_path / "exported" / ADAPTER_FILE)
    (tmp_path / "plain").mkdir()
    save_file(tensors, tmp_path / "plain" / ADAPTER_FILE)
    batch = two_groups(policy, 1)
    noise = policy.initial_noise(batch)
    with_metadata, without = (
        made_by_diffusers(tmp_path / name, batch, noise) for name in ("exported", "plain")
    )
    assert torch.equal(with_metadata, without)
    ours = policy.decode(policy.at("policy").generate(batch).x0)
    assert (ours - without).abs().max() <= 1e-4
    assert not [key for key in tensors if key.endswith(".alpha")]


def test_an_exported_layer_is_the_product_of_its_two_matrices(tmp_path):
    policy = make_policy()
    stir(policy)
    save_adapter(policy, tmp_path / "trained")
    export_weights(tmp_path / "trained", tmp_path / "exported")
    trained, exported = (load_file(tmp_path / n / ADAPTER_FILE) for n in ("trained", "exported"))
    for name in [key for key in trained if key.endswith(".lora_A.weight")]:
        other = name.replace("lora_A", "lora_B")
        assert_close(exported[other] @ exported[name], 3 * trained[other] @ trained[name])
    assert lora_settings(tmp_path / "exported").alpha == lora_settings(tmp_path / "trained").rank


def test_an_adapter_of_either_form_fills_the_policy_with_the_trained_matrices(tmp_path):
    """A checkpoint has the trained matrices and alpha in the metadata; an export alpha = rank."""
    policy = make_policy(lora=Lora(rank=4, alpha=8))
    stir(policy)
    save_adapter(policy, tmp_path / "trained")
    export_weights(tmp_path / "trained", tmp_path / "exported")
    for name in ("trained", "exported"):
        other = make_policy(lora=Lora(rank=4, alpha=8))
        load_adapter(other, tmp_path / name)
        pairs = zip(policy.parameters(), other.parameters(), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_others_may_read_every_file_of_a_run(tmp_path):
    before = os.umask(0o022)
    try:
        trainer.train(small_config(tmp_path / "run", *STEPS))
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 20
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o644"}


def test_export_writes_the_adapter_of_a_kept_step(run, finished, capsys):
    assert main(["export", str(run), "--step", "3"]) == 0
    folder = run / "adapter-step-000003"
    assert f"Adapter: {folder}" in capsys.readouterr().out
    snapshot = load_file(run / "checkpoints" / "step-000003" / "snapshots" / "ema" / ADAPTER_FILE)
    exported = load_file(folder / ADAPTER_FILE)
    assert exported.keys() == snapshot.keys()
    for key, value in exported.items():
        assert torch.equal(value, snapshot[key] * (2 if ".lora_B." in key else 1))
    assert f"pipe.load_lora_weights({str(folder)!r})" in (folder / "README.md").read_text()


def test_the_last_step_is_exported_by_default_as_training_does(run, finished, tmp_path):
    assert main(["export", str(run), "--output", str(tmp_path / "mine")]) == 0
    exported, trained = (f / ADAPTER_FILE for f in (tmp_path / "mine", finished / "adapter"))
    assert exported.read_bytes() == trained.read_bytes()
    # The same command may be given again: it replaces what it wrote.
    assert main(["export", str(run), "--output", str(tmp_path / "mine")]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "1"], "does not keep step 1; it keeps 2, 3, 4. Choose one of these"),
        (["--output", "assets"], "assets holds pairs. Choose a new folder"),
        (["--output", "README.md"], "README.md is a file. Choose a new folder"),
    ],
)
def test_an_export_that_cannot_be_is_answered(arguments, message, run, capsys):
    assert main(["export", str(run), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_run_has_nothing_to_export(tmp_path, run, capsys):
    assert main(["export", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not a run, because it has no config.yaml" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints")
    assert main(["export", str(run)]) == 2
    assert f"{run} has no checkpoint yet. Train it first" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_not_exported(run, capsys):
    flip(run / "checkpoints" / "step-000003" / "snapshots" / "ema" / ADAPTER_FILE)
    assert main(["export", str(run), "--step", "3"]) == 2
    assert f"{ADAPTER_FILE} is damaged" in capsys.readouterr().err
    assert not (run / "adapter-step-000003").exists()
