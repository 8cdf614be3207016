"""The local launcher's small parts; whole launches are in ranks/test_launchers.py."""

import subprocess
import sys

from cluster.local import close_pipe


def test_a_request_that_nobody_lived_to_read_is_no_error_at_the_end() -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""], stdin=subprocess.PIPE)
    process.wait()
    assert process.stdin is not None
    process.stdin.write(b"stop\n")  # stays in the buffer; closing tries to send it
    close_pipe(process.stdin)
    assert process.stdin.closed
