"""One driver at a time in a run's folder: two would write one history."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from launch.config import ConfigError


@contextlib.contextmanager
def only_driver(folder: Path) -> Iterator[None]:
    """Holds the run's folder until the block ends; the system lets go of it when this process dies.

    On storage or systems without file locks nothing is held.

    Raises:
        ConfigError: another process holds it; says which.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".driver", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ConfigError(
                [f"run folder {folder} is being trained into by {holder}; wait for it, stop it, or give another --run"]
            ) from None
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
