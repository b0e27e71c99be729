"""The command line: flowalign train | check | plan | sample | reward. Status 0, 1 for a failed run, 2 for wrong input."""

import argparse
import os
import sys
import warnings

from flowalign.errors import RunError, UserError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="flowalign", description="Align text-to-image flow models with rewards."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, action, text in (
        ("train", _train, "train an adapter as a YAML file says"),
        ("check", _check, "measure on its own model what could be wrong with a run"),
        ("plan", _plan, "what a run will need, before any weight is loaded"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("config", help="a YAML file, such as configs/tiny/flow_grpo.yaml")
        command.add_argument(
            "overrides",
            nargs="*",
            metavar="section.key=value",
            help="settings that override the file's",
        )
        command.set_defaults(action=action)
    # plan alone, the last of them
    command.add_argument(
        "--gpu", metavar="NAME", help="how long a step takes by it: h100, a100-80, rtx-4090, ..."
    )
    command.add_argument(
        "--memory",
        type=float,
        metavar="GB",
        help="which train.images_per_pass fits; by default the GPU's",
    )
    _sample_arguments(
        commands.add_parser("sample", help="pictures of a model, or of a run before and after")
    )
    _reward_arguments(
        commands.add_parser("reward", help="try a reward out, or serve it to other machines")
    )
    options, rest = parser.parse_known_args(argv)
    if unknown := [text for text in rest if text.startswith("-") or "overrides" not in options]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:  # overrides that follow an option
        options.overrides += rest
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        return options.action(options) or 0
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # every process has read the same input
            print(error, file=sys.stderr)
        return 2
    except RunError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "Stopped at once" + "; the last checkpoint is in place." * (options.command == "train"),
            file=sys.stderr,
        )
        return 1


def _sample_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="RUN_OR_MODEL",
        help="a run folder such as outputs/flow_grpo, or a model folder",
    )
    parser.add_argument(
        "prompts",
        nargs="*",
        help="prompts, or one .txt or .jsonl file; a run's evaluation prompts by default",
    )
    parser.add_argument("--images", type=positive, default=1, metavar="N", help="pictures a prompt")
    parser.add_argument("--steps", type=positive, default=None, help="sampler steps")
    parser.add_argument(
        "--guidance",
        type=float,
        default=None,
        help="classifier-free guidance (Flux: embedded guidance)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output",
        default=None,
        metavar="FOLDER",
        help="where to write; beside the run, or outputs/samples",
    )
    parser.set_defaults(action=_sample)


def _reward_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="what", required=True)
    spec = "a name, my_rewards.py:redness, or with settings '{clip_score: {path: FOLDER}}'"
    test = actions.add_parser(
        "test", help="one screen about a reward: scores, range, determinism, speed, gradient"
    )
    test.add_argument("spec", help=spec)
    test.add_argument(
        "--images", metavar="FOLDER", help="pictures, named by prompt or in its metadata.jsonl"
    )
    test.set_defaults(action=_reward_test)
    serve = actions.add_parser("serve", help="put a reward behind HTTP")
    serve.add_argument("spec", help=spec)
    serve.add_argument(
        "--host", default="127.0.0.1", help="127.0.0.1 is this machine alone, 0.0.0.0 the network"
    )
    serve.add_argument("--port", type=positive, default=8000)
    serve.add_argument(
        "--token-variable",
        default="FLOWALIGN_TOKEN",
        help="environment variable that holds the token to ask for",
    )
    serve.add_argument(
        "--max-megabytes",
        type=positive,
        default=256,
        help="the largest request, as sent and unpacked",
    )
    serve.set_defaults(action=_reward_serve)
    listed = actions.add_parser("list", help="the built-in rewards")
    listed.set_defaults(action=_reward_list)


def positive(text: str) -> int:
    """A count on the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def _train(options: argparse.Namespace) -> None:
    from flowalign.config.load import load_config, naming

    config = load_config(options.config, options.overrides)
    from flowalign.training.trainer import train

    with naming(options.config):
        train(config)


def _check(options: argparse.Namespace) -> int:
    from flowalign.config.load import load_config, naming

    config = load_config(options.config, options.overrides)
    from flowalign.diagnostics.check import check

    with naming(options.config):
        return 0 if check(config) else 1


def _plan(options: argparse.Namespace) -> None:
    from flowalign.config.load import load_config, naming
    from flowalign.diagnostics.plan import report

    config = load_config(options.config, options.overrides)
    with naming(options.config):
        for line in report(config, options.gpu, options.memory):
            print(line)


def _sample(options: argparse.Namespace) -> None:
    from flowalign.sampling import sample

    sample(options)


def _reward_test(options: argparse.Namespace) -> int:
    from flowalign.rewards.inspection import bundled_samples, print_inspection, samples_from
    from flowalign.rewards.registry import load_reward

    samples = samples_from(options.images) if options.images else bundled_samples()
    return 0 if print_inspection(load_reward(options.spec), samples) else 1


def _reward_serve(options: argparse.Namespace) -> None:
    from flowalign.rewards.registry import load_reward

    try:
        from flowalign.rewards.remote.server import serve
    except ImportError as error:
        raise UserError(f"serving needs {error.name}: pip install 'flowalign[serve]'.") from None
    serve(
        load_reward(options.spec),
        options.host,
        options.port,
        options.token_variable,
        options.max_megabytes,
    )


def _reward_list(_: argparse.Namespace) -> None:
    from flowalign.rewards.registry import describe_rewards

    for name, text in describe_rewards().items():
        print(f"{name:24}{text}")


if __name__ == "__main__":
    sys.exit(main())
