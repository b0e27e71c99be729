"""The command line. Each command parses its arguments and calls a function of the Python API.

Exit status 0: done. 1: the run failed, or a check found something wrong. 2: the input was wrong.
143: SIGTERM stopped a run after a step, which is saved.
"""

import argparse
import os
import sys
import warnings
from typing import NoReturn

from flowalign import __version__
from flowalign.commands.label import add_label
from flowalign.commands.output import keep_writing
from flowalign.commands.results import add_compare, add_export
from flowalign.commands.reward import add_reward
from flowalign.commands.runs import add_check, add_config, add_plan, add_train
from flowalign.commands.sample import add_sample
from flowalign.errors import RunError, UserError
from flowalign.rewards.worker import is_any_busy


def run(argv: list[str] | None = None) -> NoReturn:
    """Run a command, and end the process with its exit status."""
    status = main(argv)
    if is_any_busy():
        # Python's own exit would abort the process if a reward that hangs computes with PyTorch.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status. Wrong options end the process with status 2."""
    keep_writing()
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
    except KeyboardInterrupt as stop:
        # A run that had begun says where its finished steps are.
        nothing = "Nothing was trained." if options.command == "train" else ""
        print(f"Stopped at once. {str(stop) or nothing}".rstrip(), file=sys.stderr)
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
    add_train(commands)
    add_check(commands)
    add_plan(commands)
    add_sample(commands)
    add_export(commands)
    add_compare(commands)
    add_label(commands)
    add_reward(commands)
    add_config(commands)
    return parser


def _parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse the arguments; overrides and prompts may stand before and after options."""
    # argparse stops collecting them at the first option; what follows it lands in `rest`.
    options, rest = parser.parse_known_args(argv)
    lists = [getattr(options, name) for name in ("overrides", "prompts", "runs") if name in options]
    unknown = [text for text in rest if text.startswith("-") or not lists]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    for words in lists:
        words[:] = [_as_utf8(word) for word in [*words, *rest]]
    return options


def _as_utf8(word: str) -> str:
    """Return a word of the command line as it was typed on a terminal that writes UTF-8.

    In a locale without UTF-8, such as `LC_ALL=C`, Python stores its bytes as lone surrogates, which
    neither a file nor a tokenizer takes.
    """
    return word.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _is_first_process() -> bool:
    # Asking torch.distributed would import torch, and a wrong option should be answered at once.
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    run()
