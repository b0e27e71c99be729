"""Settings of `accelerate launch`: honoured, or refused by their names."""

import sys
from types import SimpleNamespace

import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from flowalign import distributed
from flowalign.cli import main
from flowalign.config.launch import check_launch
from flowalign.errors import UserError
from tests.tiny import ROOT, SMALL, TINY


def environment_of(*options) -> dict[str, str]:
    """What accelerate's launcher gives the processes that it starts with these options."""
    parser = launch_command_parser()
    counts = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    arguments = parser.parse_args([*counts, *options, "train.py"])
    # The launcher takes these from the file of `accelerate config`, if there is one.
    arguments.mixed_precision = arguments.mixed_precision or "no"
    arguments.dynamo_backend = arguments.dynamo_backend or "no"
    return prepare_multi_gpu_env(arguments)


@pytest.mark.parametrize("options", [(), ("--mixed_precision", "no")], ids=["none", "no"])
def test_plain_data_parallel_training_is_honoured(options):
    check_launch("float32", environment_of(*options))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_a_precision_that_the_run_has_is_honoured(precision, dtype):
    check_launch(dtype, environment_of("--mixed_precision", precision))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--mixed_precision", "bf16"), "--mixed_precision bf16, but model.dtype is float32. Set"),
        (("--mixed_precision", "fp16"), "--mixed_precision fp16, but model.dtype is float32. Set"),
        (("--use_fsdp",), r"FSDP \(--use_fsdp\), which has no effect.*distributed.shard"),
        (("--use_megatron_lm",), r"Megatron-LM \(--use_megatron_lm\)"),
        (("--dynamo_backend", "inductor"), "--dynamo_backend inductor, which has no effect"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_setting_without_effect_is_refused_by_its_name(options, problem):
    with pytest.raises(UserError, match=problem):
        check_launch("float32", environment_of(*options))


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "a parallelism config"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "fp8, but model.dtype is float32. Launch with"),
    ],
)
def test_a_setting_that_needs_more_packages_is_refused_by_its_name(variable, value, problem):
    with pytest.raises(UserError, match=problem):
        check_launch("float32", {variable: value})


@pytest.mark.parametrize("command", ["train", "check", "sample"])
def test_every_command_that_loads_the_model_refuses_them(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    arguments = [str(TINY), *SMALL, f"output={tmp_path}/run"]
    if command == "sample":
        arguments = ["assets/tiny-sd3", "a red circle"]
    assert main([command, *arguments]) == 2
    assert "Set model.dtype=bfloat16, or launch with --mixed_precision no." in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()


def test_launching_on_the_cpu_leaves_a_gpu_alone(monkeypatch):
    cuda = SimpleNamespace(is_available=lambda: True)
    monkeypatch.setattr(sys.modules[distributed.__name__].torch, "cuda", cuda)
    assert distributed.uses_gpus()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert not distributed.uses_gpus()
