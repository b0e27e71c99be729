"""The command line: help with examples that parse, exit statuses, and one message per error."""

import shlex
import subprocess
import sys

import pytest

from flowalign import __version__, api
from flowalign.cli import main, make_parser
from flowalign.commands.output import patient
from flowalign.errors import RunError, UserError
from tests.tiny import ROOT

COMMANDS = [
    ["train"],
    ["check"],
    ["plan"],
    ["sample"],
    ["export"],
    ["compare"],
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


@pytest.mark.parametrize(
    "command", [["sample"], ["export"], ["compare"], ["reward", "serve"], ["plan"]], ids=" ".join
)
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


@pytest.mark.parametrize(
    ("stop", "told"),
    [
        (KeyboardInterrupt(), "Nothing was trained."),
        (KeyboardInterrupt("It is in X."), "It is in X."),
    ],
    ids=["before training", "in training"],
)
def test_stopping_at_once_ends_with_status_1_and_says_what_is_saved(
    stop, told, monkeypatch, capsys
):
    monkeypatch.setattr(api, "train", raising(stop))
    assert main(["train", "a.yaml"]) == 1
    assert capsys.readouterr().err == f"Stopped at once. {told}\n"


def test_stopping_another_command_claims_nothing_about_training(monkeypatch, capsys):
    monkeypatch.setattr(api, "check", raising(KeyboardInterrupt()))
    assert main(["check", "a.yaml"]) == 1
    assert capsys.readouterr().err == "Stopped at once.\n"


def piped_to_nobody(code):
    """Run Python code whose standard output is closed by its reader; its status and its errors."""
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | true; "
    command += "exit ${PIPESTATUS[0]}"
    ended = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, check=False)
    return ended.returncode, ended.stderr.decode()


def test_a_reader_that_has_seen_enough_ends_the_command_quietly():
    code = "import sys; from flowalign.cli import main; sys.exit(main(['reward', 'list']))"
    assert piped_to_nobody(code) == (0, "")


TALKATIVE = """
import sys
import time
from flowalign import api, cli
from flowalign.errors import RunError
from flowalign.progress import say
from flowalign.reporting.console import shown


def train(*_):
    with shown():
        for number in range(20):
            say(f"step {{number}}")
            print("a reward's own line")
            time.sleep(0.02)
    {end}


api.train = train
sys.exit(cli.main(["train", "a.yaml"]))
"""


@pytest.mark.parametrize(
    ("end", "status", "error"),
    [("return", 0, ""), ("raise RunError('failed')", 1, "failed\n")],
    ids=["finished", "failed"],
)
def test_the_result_of_a_run_counts_whoever_reads_its_output(end, status, error):
    assert piped_to_nobody(TALKATIVE.format(end=end)) == (status, error)


def test_text_that_a_terminal_cannot_print_is_replaced(tmp_path):
    for errors, written in (
        ("replace", b"a caf? sign\n"),
        ("backslashreplace", rb"a caf\xe9 sign"),
    ):
        with (tmp_path / errors).open("w", encoding="ascii") as file:
            stream = patient(file, errors)
            print("a caf\xe9 sign", file=stream)
            print("\u7ea2", file=stream)
        assert (tmp_path / errors).read_bytes().startswith(written)


def test_a_word_is_read_as_utf8_in_a_locale_without_it(monkeypatch):
    calls = []
    monkeypatch.setattr(api, "sample_to_folder", lambda *words, **_: calls.append(words))
    # Python keeps the bytes of é like this if the locale is ASCII.
    assert main(["sample", "a", "caf\udcc3\udca9", "caf\xe9", "\u7ea2"]) == 0
    assert calls == [("a", ["caf\xe9", "caf\xe9", "\u7ea2"], None)]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--images", "0"), ("--images", "1000001"), ("--steps", "9" * 5_000), ("--seed", "1.5")],
)
def test_a_number_out_of_range_is_named(option, value, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["sample", "a", option, value])
    assert ended.value.code == 2
    assert f"argument {option}: " in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "65536", "http"])
def test_a_port_out_of_range_is_named(value, capsys):
    with pytest.raises(SystemExit):
        main(["reward", "serve", "brightness", "--port", value])
    assert "argument --port: " in capsys.readouterr().err


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0", "much"])
def test_memory_is_a_number_above_0(value, capsys):
    with pytest.raises(SystemExit):
        main(["plan", "a.yaml", f"--memory={value}"])
    assert "argument --memory: " in capsys.readouterr().err


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
