"""The debug launcher runs in this process, and Ctrl-C asks before it interrupts."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from cluster import debug

ENTRIES = "tests.ray.entries"


def test_runs_here_with_a_world_of_one():
    result = debug.run(f"{ENTRIES}:describe", {})
    assert result.exit_code == 0
    [rank] = result.results
    assert rank["pid"] == os.getpid() and rank["thread"] == "MainThread"
    assert (rank["world_size"], rank["init_method"], rank["launcher"]) == (1, "", "debug")


def test_a_failure_is_a_result():
    result = debug.run(f"{ENTRIES}:fail", {"rank": 0})
    assert result.exit_code == 1 and "rank 0 was told to fail" in result.error


def test_the_first_interrupt_stops_gracefully():
    before = signal.getsignal(signal.SIGINT)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    result = debug.run(f"{ENTRIES}:work_until_stopped", {})
    timer.join()
    assert result.exit_code == 75
    assert signal.getsignal(signal.SIGINT) == before


def test_the_second_interrupt_raises():
    timers = [threading.Timer(wait, os.kill, (os.getpid(), signal.SIGINT)) for wait in (0.2, 0.5)]
    for timer in timers:
        timer.start()
    with pytest.raises(KeyboardInterrupt):
        debug.run(f"{ENTRIES}:ignore_stop", {"seconds": 20})
    for timer in timers:
        timer.join()


def test_breakpoint_stops_in_the_entry():
    program = f"from cluster import debug; print(debug.run('{ENTRIES}:stop_at_breakpoint', {{'answer': 41}}).results)"
    run = subprocess.run(
        [sys.executable, "-c", program], input="p answer\nanswer += 1\nc\n", capture_output=True, text=True, timeout=30
    )
    assert "(Pdb) 41" in run.stdout and "{'answer': 42}" in run.stdout


def test_a_payload_that_json_cannot_hold_is_refused_as_in_the_other_launchers():
    with pytest.raises(TypeError, match="the payload"):
        debug.run(f"{ENTRIES}:echo", {"x": object()})
