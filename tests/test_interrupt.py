"""Ctrl-C in the commands that train."""

from __future__ import annotations

import os
import signal

import pytest

from psvit.commands.interrupt import Interrupt


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_that_python_would_drop_stops_work_where_the_step_ends():
    class Dropping:
        def __del__(self):
            press()  # what is raised here is printed, and forgotten

    done = []
    with Interrupt() as interrupt, interrupt.progress("work", 3) as step:
        step(1)
        Dropping()
        done.append("the step went on")
        with pytest.raises(KeyboardInterrupt):
            step(1)
    assert done


def test_a_second_ctrl_c_stops_at_once():
    with Interrupt():
        press()
        with pytest.raises(KeyboardInterrupt):
            press()


def test_an_error_that_ctrl_c_brought_about_is_an_interrupt():
    with pytest.raises(KeyboardInterrupt) as caught, Interrupt():
        press()
        raise RuntimeError("a loading process ended")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_errors_and_the_handler_are_left_alone():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError, match="of another kind"), Interrupt():
        raise RuntimeError("of another kind")
    assert signal.getsignal(signal.SIGINT) is before
