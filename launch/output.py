"""`--json`: one object alone on standard output; whatever is written for people goes to standard error meanwhile."""

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from cluster.redact import redact


class ForPeople:
    """A stream that writes to standard error and remembers standard output, for `print_json`."""

    def __init__(self, people: TextIO, machine: TextIO) -> None:
        self._people, self.machine = people, machine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._people, name)


@contextmanager
def only_json() -> Iterator[None]:
    """Inside, `print` writes to standard error, also in processes that are started, and only `print_json` to output."""
    before, machine, saved = sys.stdout, sys.stdout, None
    with suppress(OSError, ValueError, AttributeError):  # a stream in memory has no number
        if before.fileno() == 1:
            before.flush()
            saved = os.dup(1)
            machine = os.fdopen(saved, "w", encoding="utf-8", closefd=False)
            os.dup2(2, 1)
    sys.stdout = ForPeople(sys.stderr, machine)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout = before
        with suppress(BrokenPipeError):
            machine.flush()
        if saved is not None:
            os.dup2(saved, 1)
            os.close(saved)


def print_json(value: Any) -> None:
    """Writes one object on a line of standard output; figures that are not finite become null, which JSON can hold."""
    stream = getattr(sys.stdout, "machine", sys.stdout)
    stream.write(redact(json.dumps(_finite(value), allow_nan=False)) + "\n")
    stream.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
