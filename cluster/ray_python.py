"""Which Python a Ray cluster's processes on this machine run, told from what they have loaded (Linux)."""

import os
import re
from pathlib import Path

_RAY = re.compile(r"(/.*)/lib/python[0-9.]*/site-packages/ray/_raylet[^/]*$")


def python_of(maps: str) -> str:
    """The interpreter of a process that has loaded Ray, "" when it has not. maps: the text of /proc/PID/maps."""
    for line in maps.splitlines():
        if match := _RAY.search(line[line.find("/") :]):
            return f"{match[1]}/bin/python"
    return ""


def cluster_python() -> str:
    """The interpreter of the nearest process above this one that has loaded Ray: of a job, the cluster's; else ""."""
    pid = os.getppid()
    while pid > 1:
        try:
            if found := python_of(Path(f"/proc/{pid}/maps").read_text()):
                return found
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            break
    return ""
