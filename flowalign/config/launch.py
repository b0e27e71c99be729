"""Refuse settings of `accelerate launch` that training would otherwise ignore.

The launcher passes its options, and those that `accelerate config` stored, as environment
variables. Honoured are processes, machines, GPUs, threads, `--cpu` and processor affinity.
"""

from collections.abc import Mapping

from flowalign.errors import UserError

SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP (--use_fsdp)",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed (--use_deepspeed)",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM (--use_megatron_lm)",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config (--use_parallelism_config)",
}
"""Settings that would split the model, by the variable that turns them on."""
DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
"""The `model.dtype` that computes as a `--mixed_precision` of the launcher."""


def check_launch(dtype: str, environment: Mapping[str, str]) -> None:
    """Raise UserError if the launcher asks for something that a run does not do.

    Args:
        dtype: `model.dtype` of the run.
        environment: The environment variables of this process.
    """
    for variable, setting in SHARDING.items():
        if environment.get(variable, "").lower() in ("1", "true"):
            raise UserError(
                f"accelerate launch asks for {setting}, which has no effect. Launch with "
                "--multi_gpu, or remove the setting by `accelerate config`. To split the weights, "
                "set distributed.shard: true."
            )
    compiler = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if compiler.lower() != "no":
        raise UserError(
            f"accelerate launch asks for --dynamo_backend {compiler.lower()}, which has no effect. "
            "Set model.compile: true instead, and launch with --dynamo_backend no."
        )
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    # A launcher that asks for what the run does anyway is honoured.
    if precision == "no" or DTYPES.get(precision) == dtype:
        return
    ours = f"set model.dtype={DTYPES[precision]}, or " if precision in DTYPES else ""
    fix = f"{ours}launch with --mixed_precision no"
    raise UserError(
        f"accelerate launch asks for --mixed_precision {precision}, but model.dtype is {dtype}. "
        f"{fix[:1].upper()}{fix[1:]}."
    )
