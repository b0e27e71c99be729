"""Commands about a configuration: train, check, plan, and config schema."""

import argparse
import json

from flowalign import api
from flowalign.commands.command import Command, Commands, gigabytes


def add_train(commands: Commands) -> None:
    """Add the command `train`."""
    command = Command(
        name="train",
        summary="train an adapter as a YAML file says, or resume its training",
        examples="  flowalign train configs/tiny/crd.yaml\n"
        "  flowalign train configs/tiny/crd.yaml train.steps=20 output=outputs/short\n"
        "  torchrun --nproc-per-node 2 train.py configs/tiny/crd.yaml",
        action=_train,
    )
    _add_config_arguments(command.add_to(commands))


def _train(options: argparse.Namespace) -> int:
    api.train(options.config, options.overrides)
    return 0


def add_check(commands: Commands) -> None:
    """Add the command `check`."""
    command = Command(
        name="check",
        summary="measure on the model itself whether a run would work",
        examples="  flowalign check configs/tiny/crd.yaml",
        action=_check,
    )
    _add_config_arguments(command.add_to(commands))


def _check(options: argparse.Namespace) -> int:
    return 0 if api.check(options.config, options.overrides) else 1


def add_plan(commands: Commands) -> None:
    """Add the command `plan`."""
    command = Command(
        name="plan",
        summary="predict memory and time of a run without loading weights",
        examples="  flowalign plan configs/tiny/crd.yaml\n"
        "  flowalign plan configs/sd3/crd.yaml --gpu h100",
        action=_plan,
    )
    parser = command.add_to(commands)
    _add_config_arguments(parser)
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help="a GPU to predict times for, such as h100, a100-80 or rtx-4090 (default: none)",
    )
    parser.add_argument(
        "--memory",
        type=gigabytes,
        metavar="GB",
        help="memory that train.images_per_pass should fit (default: that of the GPU)",
    )


def _plan(options: argparse.Namespace) -> int:
    for line in api.plan(options.config, options.overrides, options.gpu, options.memory):
        print(line)
    return 0


def add_config(commands: Commands) -> None:
    """Add the command `config`."""
    command = Command(
        name="config",
        summary="write a JSON schema of the configuration, for editors",
        examples="  flowalign config schema > flowalign.schema.json",
        action=_config_schema,
    )
    actions = command.add_to(commands).add_subparsers(required=True, metavar="ACTION")
    Command(
        name="schema",
        summary="write a JSON schema of all sections, with which an editor completes keys",
        examples="  flowalign config schema > flowalign.schema.json",
        action=_config_schema,
    ).add_to(actions)


def _config_schema(_: argparse.Namespace) -> int:
    print(json.dumps(api.config_schema(), indent=2))
    return 0


def _add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", metavar="CONFIG", help="a YAML file, such as configs/tiny/crd.yaml"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="settings that replace those of the file",
    )
