"""Signals of real processes, and handlers that come back."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from lowdim_diffusion.training import preemption
from lowdim_diffusion.training.preemption import StopSignal

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", SIGNALS)
def test_first_signal_sets_the_flag_and_handlers_come_back(number):
    before = [signal.getsignal(one) for one in SIGNALS]
    with StopSignal() as stop:
        assert not stop.requested and stop.name == ""
        os.kill(os.getpid(), number)
        assert stop.requested and stop.name == signal.Signals(number).name
    assert [signal.getsignal(one) for one in SIGNALS] == before


def test_second_ctrl_c_interrupts():
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_handlers_come_back_after_an_error():
    before = [signal.getsignal(one) for one in SIGNALS]
    with pytest.raises(KeyError), StopSignal():
        raise KeyError
    assert [signal.getsignal(one) for one in SIGNALS] == before


def test_ignored_signals_count_too():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.requested
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_install_nothing():
    seen = []

    def work():
        with StopSignal() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


PROGRAM = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("preemption", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
with module.StopSignal() as stop:
    print("START", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print(stop.name, flush=True)
    if sys.argv[2] == "polite":
        sys.exit(75)
    time.sleep(60)
"""


def start(mode):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(pathlib.Path(preemption.__file__)), mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "START\n"
    return process


@pytest.mark.parametrize("number", SIGNALS)
def test_one_signal_ends_politely(number):
    process = start("polite")
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out.strip()) == (75, signal.Signals(number).name)


@pytest.mark.parametrize("second", SIGNALS)
@pytest.mark.parametrize("first", SIGNALS)
def test_second_signal_ends_at_once(first, second):
    process = start("busy")
    process.send_signal(first)
    assert process.stdout.readline() == f"{signal.Signals(first).name}\n"
    begin = time.monotonic()
    process.send_signal(second)
    process.communicate(timeout=20)
    assert process.returncode == -second and time.monotonic() - begin < 10
