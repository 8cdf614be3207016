"""The first process of a submitted job: `python -m cluster.job_main COMMAND...` runs the command and notes its end.

Ray reports no exit status for a job that was stopped, so this leaves it as the log's last line. Ray sends its signal
to every process of the job; this one ignores it and waits for the command, which decides when it has stopped.
"""

import re
import signal
import subprocess
import sys

EXIT_LINE = re.compile(r"^trimtab job: exit status (\d+)\s*$", re.MULTILINE)


def exit_line(code: int) -> str:
    """What is written for a command that ended with this status."""
    return f"trimtab job: exit status {code}"


def find_exit_code(log: str) -> int | None:
    """The status in a job's log, None when the job was killed before it could write one."""
    found = EXIT_LINE.findall(log)
    return int(found[-1]) if found else None


def main(command: list[str]) -> int:
    """Runs the command with this process's streams and returns its status (128 + n when signal n ended it)."""
    child = subprocess.Popen(command)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    code = child.wait()
    code = code if code >= 0 else 128 - code
    print(exit_line(code), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
