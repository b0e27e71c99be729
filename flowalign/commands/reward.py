"""Commands about rewards: test, accuracy, serve and list."""

import argparse

from flowalign import api
from flowalign.commands.command import Command, Commands, port, positive

REWARD_SPEC = (
    "a built-in name, my_rewards.py:redness, or a name with settings: "
    "'{clip_score: {path: FOLDER}}'"
)


def add_reward(commands: Commands) -> None:
    """Add the command `reward`."""
    # The action of the group is never called: argparse requires one of the actions below.
    command = Command(
        name="reward",
        summary="try a reward, compare it with votes, serve it, or list the built-in ones",
        examples="  flowalign reward list\n  flowalign reward test scene_match",
        action=_reward_list,
    )
    actions = command.add_to(commands).add_subparsers(required=True, metavar="ACTION")
    _add_reward_test(actions)
    _add_reward_accuracy(actions)
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
    return 0 if api.inspect_reward(options.spec, options.images) else 1


def _add_reward_accuracy(actions: Commands) -> None:
    command = Command(
        name="accuracy",
        summary="measure how often rewards agree with people's choices among two pictures",
        examples="  flowalign reward accuracy clip_score --votes assets/pairs/evaluation.parquet\n"
        "  flowalign reward accuracy pick_score hps --votes my_votes.jsonl",
        action=_reward_accuracy,
    )
    parser = command.add_to(actions)
    parser.add_argument("specs", metavar="REWARD", nargs="+", help=REWARD_SPEC)
    parser.add_argument(
        "--votes",
        required=True,
        metavar="FILE",
        help="a vote file with stored pictures, or pairs as data.pairs has them",
    )


def _reward_accuracy(options: argparse.Namespace) -> int:
    api.reward_accuracy(options.specs, options.votes)
    return 0


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
        "--port", type=port, default=8000, metavar="N", help="port (default: %(default)s)"
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
    from flowalign.rewards.remote.server import serve

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
