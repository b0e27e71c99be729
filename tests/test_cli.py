"""The command line: help with examples that parse, exit statuses, and one message per error."""

import shlex
import subprocess
import sys

import pytest

from flowalign import __version__, api
from flowalign.cli import main, make_parser
from flowalign.errors import RunError, UserError
from tests.tiny import ROOT

COMMANDS = [
    ["train"],
    ["check"],
    ["plan"],
    ["sample"],
    ["reward"],
    ["reward", "test"],
    ["reward", "serve"],
    ["reward", "list"],
    ["config"],
    ["config", "schema"],
]


def help_of(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_says_what_it_does_with_examples_that_parse(command, capsys):
    text = help_of(command, capsys)
    usage, description, *_ = text.split("\n\n")
    assert usage.startswith(f"usage: flowalign {' '.join(command)}")
    assert description.endswith(".")
    examples = [line.split("flowalign ", 1)[1] for line in example_lines(text)]
    assert examples
    for example in examples:
        words = shlex.split(example.partition(" > ")[0])
        assert words[: len(command)] == command or len(command) == 1
        make_parser().parse_known_args(words)


def example_lines(text):
    return [
        line
        for line in text.partition("examples:\n")[2].splitlines()
        if " flowalign " in line and "torchrun" not in line
    ]


@pytest.mark.parametrize("command", [["sample"], ["reward", "serve"], ["plan"]], ids=" ".join)
def test_every_option_names_its_default(command, capsys):
    options = help_of(command, capsys).partition("options:")[2].partition("examples:")[0]
    described = [part for part in options.split("\n  --") if part.strip()][1:]
    assert described
    assert all("(default:" in " ".join(part.split()) for part in described)


def test_the_list_of_commands_is_complete(capsys):
    text = help_of([], capsys)
    for command in {command[0] for command in COMMANDS}:
        assert f"\n    {command} " in text


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"flowalign {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [[], ["trian"], ["sample"], ["train", "a.yaml", "--fast"], ["reward", "list", "x"]]
)
def test_wrong_options_end_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: flowalign" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"), [(UserError("wrong"), 2), (RunError("failed"), 1)], ids=["user", "run"]
)
def test_an_error_is_one_message_on_stderr_without_a_traceback(error, status, monkeypatch, capsys):
    monkeypatch.setattr(api, "train", raising(error))
    assert main(["train", "a.yaml"]) == status
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"{error}\n")


def test_of_several_processes_the_first_says_what_the_user_got_wrong(monkeypatch, capsys):
    monkeypatch.setattr(api, "train", raising(UserError("wrong")))
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "a.yaml"]) == 2
    assert capsys.readouterr() == ("", "")


def test_a_second_ctrl_c_ends_with_status_1_and_names_the_checkpoint(monkeypatch, capsys):
    monkeypatch.setattr(api, "train", raising(KeyboardInterrupt()))
    assert main(["train", "a.yaml"]) == 1
    assert capsys.readouterr().err == "Stopped at once. The last checkpoint is complete.\n"


def test_a_reader_that_has_seen_enough_ends_the_command_quietly():
    command = f"{shlex.quote(sys.executable)} -m flowalign.cli reward list | true; "
    command += "exit ${PIPESTATUS[0]}"
    ended = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")


def raising(error):
    def function(*_, **__):
        raise error

    return function


def test_prompts_may_stand_on_both_sides_of_an_option(monkeypatch):
    calls = []
    monkeypatch.setattr(api, "sample_to_folder", lambda *words, **_: calls.append(words))
    assert main(["sample", "a", "--images", "4", "a red circle"]) == 0
    assert main(["sample", "a", "a circle", "--seed", "1", "a square"]) == 0
    assert calls == [("a", ["a red circle"], None), ("a", ["a circle", "a square"], None)]


def test_overrides_may_stand_on_both_sides_of_an_option(monkeypatch):
    calls = []
    monkeypatch.setattr(api, "plan", lambda *arguments: calls.append(arguments) or [])
    assert main(["plan", "a.yaml", "train.steps=1", "--gpu", "h100", "output=b"]) == 0
    assert calls == [("a.yaml", ["train.steps=1", "output=b"], "h100", None)]
