"""A program that nobody has read: what it may do, what it may not, and that nothing of it is left."""

import socket
import sys
import time
from pathlib import Path

import pytest

from launch import sandbox
from launch.sandbox import Limits, SandboxError, run_untrusted

pytestmark = pytest.mark.skipif(
    bool(sandbox.missing_protections()), reason=f"this machine lacks {', '.join(sandbox.missing_protections())}"
)
QUICK = Limits(wall_s=5, cpu_s=1, memory_bytes=256 << 20, file_bytes=4096)


def test_a_correct_program_passes_and_a_wrong_one_fails_with_its_last_words() -> None:
    good = run_untrusted("import math, collections, re\nassert math.gcd(12, 18) == 6\nprint('fine')", QUICK)
    assert good.passed and good.output == "fine\n"
    bad = run_untrusted("assert sorted([2, 1]) == [2, 1], 'out of order'", QUICK)
    assert bad.status == 1 and "AssertionError: out of order" in bad.output


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("while True: pass", None),  # processor time
        ("x = bytearray(1 << 30)", "MemoryError"),
        ("open('big', 'wb').write(bytes(1 << 20))", None),  # file size
        ("import os; print(os.listdir('/root'))", "PermissionError"),
        ("open('/etc/passwd').read()", "PermissionError"),
        ("open('/tmp/trimtab-was-here', 'w')", "PermissionError"),
        ("import os; os.kill(os.getppid() or 1 << 20, 9)", "ProcessLookupError"),  # nobody else is in its space
        ("import os; assert not [k for k in os.environ if k not in ('PATH', 'LC_CTYPE')], os.environ; 1/0", "ZeroDiv"),
        ("input()", "EOFError"),
    ],
)
def test_what_it_may_not_do(source: str, said: str | None) -> None:
    outcome = run_untrusted(source, QUICK)
    assert not outcome.passed
    assert said is None or said in outcome.output


def test_it_has_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        source = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
        outcome = run_untrusted(source, QUICK)
    assert not outcome.passed and ("OSError" in outcome.output or "Refused" in outcome.output)


def test_sleeping_ends_by_the_clock_and_children_in_sessions_of_their_own_end_too(tmp_path: Path) -> None:
    mark = f"trimtab-child-{time.monotonic_ns()}"
    source = (
        "import ctypes, os, time\n"
        "ctypes.CDLL(None).prctl(1, 0)\n"  # asks not to be ended with its parent
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        f"    os.execv({sys.executable!r}, ['{mark}', '-c', 'import time; time.sleep(60)'])\n"
        "os.setsid()\n"
        "time.sleep(60)\n"
    )
    outcome = run_untrusted(source, Limits(wall_s=1.0))
    assert outcome.status is None, outcome
    deadline = time.monotonic() + 5
    while alive(mark):
        assert time.monotonic() < deadline, "a child of the program outlives it"
        time.sleep(0.02)


def alive(mark: str) -> bool:
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in cmdline.read_bytes():
                return True
        except OSError:  # it ended while we looked
            continue
    return False


def test_a_machine_without_a_protection_refuses_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_missing", ("restricted files (Landlock)",))
    with pytest.raises(SandboxError, match=r"restricted files.*--accept-weaker-sandbox"):
        run_untrusted("print(1)", QUICK)
    assert run_untrusted("print(1)", QUICK, accept_weaker=True).output == "1\n"
