"""Signals during training: what each of them asks for, and who receives them afterwards."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from flowalign.runs.interrupt import Interrupt

SIGNALS = signal.SIGINT, signal.SIGTERM


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


def send(number):
    os.kill(os.getpid(), number)


def test_the_first_ctrl_c_asks_for_a_stop_and_the_second_stops(capsys):
    interrupt, before = Interrupt(), handlers()
    with interrupt.listening():
        send(signal.SIGINT)
        assert (interrupt.requested, interrupt.terminated) == (True, False)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert handlers() == before
    out = capsys.readouterr().out
    assert out == "Finishing this step, then saving. Press Ctrl-C again to stop at once.\n"


def test_sigterm_asks_for_a_stop_however_often_it_comes(capsys):
    """A scheduler sends it to every process, and torchrun sends it to its own once more."""
    interrupt, before = Interrupt(), handlers()
    with interrupt.listening():
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert (interrupt.requested, interrupt.terminated) == (True, True)
    assert handlers() == before
    assert capsys.readouterr().out == "Finishing this step, then saving.\n"


def test_sigterm_after_ctrl_c_ends_the_process_after_the_step():
    interrupt = Interrupt()
    with interrupt.listening():
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert interrupt.terminated


def test_a_thread_leaves_signals_to_the_program_that_started_it():
    before = handlers()

    def inside():
        with Interrupt().listening():
            return handlers()

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(inside).result() == before
