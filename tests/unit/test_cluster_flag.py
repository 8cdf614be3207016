"""Signals that arrive together must not stop a process for ever."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cluster.flag import StopFlag

ROOT = Path(__file__).resolve().parents[2]
# Handlers are entered between bytecodes: with so many signals some arrive while a handler, or a wait, is at work.
STORM = """
import os
from cluster.signals import StopSignals

with StopSignals() as signals:
    print("ready", flush=True)
    for _ in range(200_000):
        signals.stop.wait(0)
    print("ended", signals.name, flush=True)
    os._exit(0)
"""


def test_a_storm_of_signals_is_one_request() -> None:
    process = subprocess.Popen([sys.executable, "-c", STORM], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"

    def storm() -> None:
        while process.poll() is None:
            os.kill(process.pid, signal.SIGTERM)
            os.kill(process.pid, signal.SIGHUP)
            time.sleep(0)

    thread = threading.Thread(target=storm)
    thread.start()
    try:
        process.wait(timeout=30)
    finally:
        process.kill()
        thread.join()
    assert process.stdout.read().startswith("ended SIG")


def test_waiting_ends_with_the_flag_or_the_time() -> None:
    flag = StopFlag()
    assert not flag.wait(0.01) and not flag.is_set()
    threading.Timer(0.05, flag.set).start()
    assert flag.wait(10)
    assert flag.wait(0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_handler_may_set_it_while_another_does(number: signal.Signals) -> None:
    flag = StopFlag()
    previous = signal.signal(number, lambda *_: flag.set())
    try:
        os.kill(os.getpid(), number)
        assert flag.wait(1)
    finally:
        signal.signal(number, previous)
