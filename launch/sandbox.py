"""Runs Python source that nobody has read (a model wrote it) in a process that can do little and ends in time."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

CHILD = Path(__file__).with_name("sandbox_child.py")
OUTPUT_KEPT = 2000  # characters of what a program wrote
GRACE_S = 20.0  # for the sandbox itself to begin and end


@dataclass(frozen=True)
class Limits:
    """What a program may use: seconds by the clock and of processor time, bytes of address space and of a file."""

    wall_s: float = 10.0
    cpu_s: int = 10
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    status: exit status of the program, 128 + signal where a signal ended it; None where the time was up.
    output: the end of what it wrote. missing: protections that this machine does not offer.
    """

    status: int | None
    output: str
    missing: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether it ran to its end without an error."""
        return self.status == 0


class SandboxError(RuntimeError):
    """The machine does not offer a protection, or the sandbox itself failed."""


def run_untrusted(source: str, limits: Limits | None = None, accept_weaker: bool = False) -> Outcome:
    """Runs a Python program in a folder of its own that is deleted afterwards.

    No network, no files but the interpreter's, no environment, no input, limits on time, memory and file size;
    everything that it starts ends with it. What sandbox_child.py cannot arrange on this machine is refused.

    Args:
        source: the program.
        limits: None for the defaults.
        accept_weaker: run although protections are missing; they are named in the outcome.

    Raises:
        SandboxError: protections are missing and not waived; nothing of the program has run then, since the check
            comes first.
    """
    limits = limits or Limits()
    if not accept_weaker and (missing := missing_protections()):
        raise SandboxError(
            f"this machine does not offer {' and '.join(missing)}, so a program that nobody has read would run too "
            "freely; run it on a Linux machine that does, in a container of your own with --accept-weaker-sandbox, "
            "or leave it out"
        )
    return _run(source, limits)


_missing: tuple[str, ...] | None = None


def missing_protections() -> tuple[str, ...]:
    """The protections that this machine does not offer, tried once with a program that does nothing."""
    global _missing
    if _missing is None:
        if not sys.platform.startswith("linux"):
            _missing = ("namespaces and Landlock, which only Linux has",)
        else:
            _missing = _run("", Limits()).missing
    return _missing


def _run(source: str, limits: Limits) -> Outcome:
    folder = Path(tempfile.mkdtemp(prefix="trimtab-sandbox-"))
    try:
        program, output = folder / "program.py", folder / "output"
        program.write_text(source, encoding="utf-8")
        told = json.dumps(asdict(limits))
        read_end, write_end = os.pipe()
        with output.open("wb") as sink, os.fdopen(read_end) as said:
            process = subprocess.Popen(
                [sys.executable, "-I", str(CHILD), told, str(folder), str(program), str(write_end)],
                stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, pass_fds=(write_end,),
                start_new_session=True, env={"PATH": "/usr/bin:/bin"},
            )  # fmt: skip
            os.close(write_end)
            try:
                process.wait(limits.wall_s + GRACE_S)
            except subprocess.TimeoutExpired as error:
                raise SandboxError(f"the sandbox did not end within {limits.wall_s + GRACE_S:g} s") from error
            finally:
                _kill(process)
            lines = said.read().splitlines()
        found = [line.removeprefix("status ") for line in lines if line.startswith("status ")]
        written = output.read_text("utf-8", "replace")[-OUTPUT_KEPT:]
        if not found:
            raise SandboxError(f"the sandbox ended with status {process.returncode} before its program did: {written}")
        missing = tuple(line.removeprefix("missing ") for line in lines if line.startswith("missing "))
        return Outcome(None if found[-1] == "timeout" else int(found[-1]), written, missing)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends the sandbox, if it has not ended; its program dies with it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
