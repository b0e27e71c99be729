"""The command line. Each command parses its arguments and calls a function of the Python API.

Exit status 0: done. 1: the run failed, or a check found something wrong. 2: the input was wrong.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from flowalign import __version__, api
from flowalign.errors import RunError, UserError

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Action = Callable[[argparse.Namespace], int]
REWARD_SPEC = (
    "a built-in name, my_rewards.py:redness, or a name with settings: "
    "'{clip_score: {path: FOLDER}}'"
)


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command: its help, and the function that carries it out."""

    name: str
    """Word on the command line."""
    summary: str
    """One line for the list of commands."""
    examples: str
    """Command lines that work in a clone of the repository."""
    action: Action
    """Function of the parsed options. Returns the exit status."""

    def add_to(self, commands: Commands) -> argparse.ArgumentParser:
        """Add a parser for the command."""
        parser = commands.add_parser(
            self.name,
            help=self.summary,
            description=f"{self.summary[:1].upper()}{self.summary[1:]}.",
            epilog=f"examples:\n{self.examples}",
            # Examples keep their line breaks.
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.set_defaults(action=self.action)
        return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status. Wrong options end the process with status 2."""
    options = _parse(make_parser(), argv)
    # Tokenizers warn once for every forked process otherwise.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # diffusers and transformers warn of their own deprecated calls, which a user cannot change.
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        return options.action(options)
    except UserError as error:
        # Every process has read the same input, so one of them is enough to say what is wrong.
        if _is_first_process():
            print(error, file=sys.stderr)
        return 2
    except RunError as error:
        # A reward can fail on one process alone, so each process prints its own message.
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        saved = " The last checkpoint is complete." if options.command == "train" else ""
        print(f"Stopped at once.{saved}", file=sys.stderr)
        return 1


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="flowalign",
        description="Align text-to-image flow models with rewards and preferences.",
        epilog="Each command has examples: flowalign train --help",
    )
    parser.add_argument("--version", action="version", version=f"flowalign {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_check(commands)
    _add_plan(commands)
    _add_sample(commands)
    _add_reward(commands)
    _add_config(commands)
    return parser


def positive(text: str) -> int:
    """Convert a count on the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse the arguments; overrides may stand before and after options."""
    # argparse stops collecting overrides at the first option; what follows it lands in `rest`.
    options, rest = parser.parse_known_args(argv)
    takes_overrides = "overrides" in options
    unknown = [text for text in rest if text.startswith("-") or not takes_overrides]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if takes_overrides:
        options.overrides += rest
    return options


def _is_first_process() -> bool:
    # Asking torch.distributed would import torch, and a wrong option should be answered at once.
    return os.environ.get("RANK", "0") == "0"


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


def _add_train(commands: Commands) -> None:
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


def _add_check(commands: Commands) -> None:
    command = Command(
        name="check",
        summary="measure on the model itself whether a run would work",
        examples="  flowalign check configs/tiny/crd.yaml",
        action=_check,
    )
    _add_config_arguments(command.add_to(commands))


def _check(options: argparse.Namespace) -> int:
    return 0 if api.check(options.config, options.overrides) else 1


def _add_plan(commands: Commands) -> None:
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
        type=float,
        metavar="GB",
        help="memory that train.images_per_pass should fit (default: that of the GPU)",
    )


def _plan(options: argparse.Namespace) -> int:
    for line in api.plan(options.config, options.overrides, options.gpu, options.memory):
        print(line)
    return 0


def _add_sample(commands: Commands) -> None:
    command = Command(
        name="sample",
        summary="make pictures with a run, a checkpoint, an adapter or a model",
        examples='  flowalign sample outputs/crd "a red circle left of a blue square" --images 4\n'
        "  flowalign sample outputs/crd/checkpoints/step-000100 prompts.txt\n"
        '  flowalign sample my_adapter "a red circle" --model assets/tiny-sd3\n'
        '  flowalign sample assets/tiny-sd3 "a red circle" --steps 10 --output pictures',
        action=_sample,
    )
    parser = command.add_to(commands)
    parser.add_argument(
        "source",
        metavar="RUN_OR_MODEL_OR_ADAPTER",
        help="a run folder, a checkpoint, an adapter, a model folder, or a model on the hub",
    )
    parser.add_argument(
        "prompts",
        nargs="*",
        metavar="PROMPT",
        help="prompts, or one .txt or .jsonl file (default: evaluation prompts of the run)",
    )
    parser.add_argument(
        "--images", type=positive, default=1, metavar="N", help="pictures per prompt (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed (default: 0)")
    _add_sampler_arguments(parser)


def _add_sampler_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help="sampler steps (default: those of the run's evaluation, or 28)",
    )
    parser.add_argument(
        "--guidance",
        type=float,
        metavar="SCALE",
        help="guidance scale (default: that of the run's evaluation, or of the model family)",
    )
    parser.add_argument(
        "--model", metavar="MODEL", help="base model of an adapter (default: read from its card)"
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="where to save; files are never replaced "
        "(default: samples, samples-2, ... in the run folder, or in outputs)",
    )


def _sample(options: argparse.Namespace) -> int:
    api.sample_to_folder(
        options.source,
        options.prompts or None,
        options.output,
        images=options.images,
        seed=options.seed,
        steps=options.steps,
        guidance=options.guidance,
        model=options.model,
    )
    return 0


def _add_reward(commands: Commands) -> None:
    # The action of the group is never called: argparse requires one of the actions below.
    command = Command(
        name="reward",
        summary="try a reward, serve it over HTTP, or list the built-in rewards",
        examples="  flowalign reward list\n  flowalign reward test scene_match",
        action=_reward_list,
    )
    actions = command.add_to(commands).add_subparsers(required=True, metavar="ACTION")
    _add_reward_test(actions)
    _add_reward_serve(actions)
    Command(
        name="list",
        summary="list the built-in rewards",
        examples="  flowalign reward list",
        action=_reward_list,
    ).add_to(actions)


def _add_reward_test(actions: Commands) -> None:
    command = Command(
        name="test",
        summary="score pictures and report range, determinism, speed and gradient",
        examples="  flowalign reward test clip_score\n"
        "  flowalign reward test my_rewards.py:redness --images my_pictures",
        action=_reward_test,
    )
    parser = command.add_to(actions)
    parser.add_argument("spec", metavar="REWARD", help=REWARD_SPEC)
    parser.add_argument(
        "--images",
        metavar="FOLDER",
        help="pictures, whose names or metadata.jsonl give the prompts (default: bundled samples)",
    )


def _reward_test(options: argparse.Namespace) -> int:
    from flowalign.rewards.inspection import bundled_samples, print_inspection, samples_from
    from flowalign.rewards.registry import load_reward

    samples = samples_from(options.images) if options.images else bundled_samples()
    return 0 if print_inspection(load_reward(options.spec), samples) else 1


def _add_reward_serve(actions: Commands) -> None:
    command = Command(
        name="serve",
        summary="serve a reward over HTTP, so that runs on other machines can use it",
        examples="  flowalign reward serve pick_score --port 8000\n"
        "  FLOWALIGN_TOKEN=secret flowalign reward serve ocr --host 0.0.0.0",
        action=_reward_serve,
    )
    parser = command.add_to(actions)
    parser.add_argument("spec", metavar="REWARD", help=REWARD_SPEC)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 is the whole network (default: %(default)s)",
    )
    parser.add_argument(
        "--port", type=positive, default=8000, metavar="N", help="port (default: %(default)s)"
    )
    parser.add_argument(
        "--token-variable",
        default="FLOWALIGN_TOKEN",
        metavar="NAME",
        help="environment variable with the token that clients must send (default: %(default)s)",
    )
    parser.add_argument(
        "--max-megabytes",
        type=positive,
        default=256,
        metavar="N",
        help="largest request, compressed and uncompressed (default: %(default)s)",
    )


def _reward_serve(options: argparse.Namespace) -> int:
    from flowalign.rewards.registry import load_reward

    # FastAPI is an optional dependency: training machines do not need it.
    try:
        from flowalign.rewards.remote.server import serve
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed, and serving needs it. "
            "Install it: pip install 'flowalign[serve]'."
        ) from None
    serve(
        load_reward(options.spec),
        options.host,
        options.port,
        options.token_variable,
        options.max_megabytes,
    )
    return 0


def _reward_list(_: argparse.Namespace) -> int:
    from flowalign.rewards.registry import describe_rewards

    for name, text in describe_rewards().items():
        print(f"{name:24}{text}")
    return 0


def _add_config(commands: Commands) -> None:
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
    from flowalign.config.schema import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
