"""The command that asks people: label."""

import argparse
import getpass

from flowalign import api
from flowalign.commands.command import Command, Commands, port, positive

MODES = ("pair", "group", "thumbs")


def add_label(commands: Commands) -> None:
    """Add the command `label`."""
    command = Command(
        name="label",
        summary="open a page on which you choose among pictures, to train on your choices",
        examples="  flowalign label outputs/crd\n"
        "  flowalign label configs/tiny/votes.yaml --questions 60\n"
        "  flowalign label assets/tiny-sd3 --prompts assets/prompts/train.jsonl --mode thumbs\n"
        "  flowalign label my_pictures --votes my_votes.jsonl",
        action=_label,
    )
    parser = command.add_to(commands)
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a run folder, a YAML file, an adapter or a model, which make the pictures; or a "
        "folder of pictures",
    )
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="pair",
        help="compare two pictures, choose the best and the worst of a group, or like single ones "
        "(default: pair)",
    )
    parser.add_argument(
        "--pictures", type=positive, default=4, metavar="N", help="pictures of a group (default: 4)"
    )
    parser.add_argument(
        "--questions", type=positive, default=100, metavar="N", help="questions (default: 100)"
    )
    parser.add_argument(
        "--prompts", default="", metavar="FILE", help="prompts (default: those of the run)"
    )
    parser.add_argument(
        "--votes",
        default="",
        metavar="FILE",
        help="vote file, which is continued if it exists (default: votes/votes.jsonl in the run "
        "folder, or in outputs/votes)",
    )
    _add_page_arguments(parser)


def _add_page_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--voter", default=_user(), metavar="NAME", help="name of the voter (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the pictures (default: 0)"
    )
    parser.add_argument(
        "--choose",
        choices=("random", "active"),
        default="random",
        help="the next pair: random, or the one that would teach the reward taste the most, of "
        "eight that are made (default: random)",
    )
    parser.add_argument(
        "--features",
        default="",
        metavar="MODEL",
        help="image model of an active choice, such as openai/clip-vit-large-patch14 "
        "(default: the bundled CLIP, for the bundled world)",
    )
    parser.add_argument(
        "--keys-only",
        action="store_true",
        help="store no picture files; pictures are made again from their keys",
    )
    parser.add_argument(
        "--model", metavar="MODEL", help="base model of an adapter (default: read from its card)"
    )
    parser.add_argument(
        "--port", type=port, default=0, metavar="N", help="port of the page (default: a free one)"
    )
    parser.add_argument(
        "--no-browser", action="store_true", help="print the address and open no browser"
    )


def _user() -> str:
    """Return the name of the user, or "voter" where the system knows none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "voter"


def _label(options: argparse.Namespace) -> int:
    api.label(
        options.source,
        model=options.model,
        port=options.port,
        opens=not options.no_browser,
        mode=options.mode,
        pictures=options.pictures,
        questions=options.questions,
        prompts=options.prompts,
        votes=options.votes,
        voter=options.voter.strip() or "voter",
        seed=options.seed,
        choose=options.choose,
        features=options.features,
        stores=not options.keys_only,
    )
    return 0
