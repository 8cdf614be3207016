"""A process that is started without standard output or error (`>&-`) works, with the right exit status."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
# Opens a file first thing, which must not become standard output, and prints into the place of that.
SCRIPT = """
import sys
from launch.lasting import open_missing_streams
open_missing_streams()
from cluster.redact import guard_output, restore_output
with open(sys.argv[1], "w") as file:
    guard_output()
    print("out")
    print("error", file=sys.stderr)
    sys.stdin.read()
    restore_output()
    assert file.fileno() > 2
"""


def shell(command: str, *words: str) -> subprocess.CompletedProcess:
    """Runs a command of a shell, which does the closing; its words are $@."""
    return subprocess.run(
        ["bash", "-c", command, "x", *words], capture_output=True, text=True, cwd=ROOT, stdin=subprocess.DEVNULL
    )


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_nothing_is_printed_into_files_and_the_status_is_right(closed: str, tmp_path: Path):
    done = shell(f'"$@" {closed}', sys.executable, "-c", SCRIPT, str(tmp_path / "file"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file").read_text() == ""
    assert done.stdout == ("" if ">&- " in f"{closed} " and not closed.startswith("2") else "out\n")


def test_the_command_line_keeps_its_exit_statuses():
    done = shell('"$@" config optimizer.lr >&-; a=$?; "$@" config optimizer.no >&- 2>&-; exit $((10 * $? + a))',
                 str(Path(sys.executable).parent / "trimtab"))  # fmt: skip
    assert done.returncode == 20 and "Traceback" not in done.stderr
