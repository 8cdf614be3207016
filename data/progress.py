"""How far an interrupted packing came: enough to go on writing at the same byte."""

from __future__ import annotations

import json
import os
import shutil
import socket
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.node_cache import place_file

PROGRESS = "progress.json"


@dataclass
class PackState:
    """What a packing has written so far.

    Attributes:
        number: documents written; done: bytes of their text; lossless: see Manifest; listing_bytes: of documents.jsonl.
        measured_bytes, lost_bytes, measured_tokens, unknown_tokens: what LossMeter has counted; lossy_example: the
            first document that lost something.
        counts: [documents, bytes of text] by split; writers: ShardWriter.state() by split.
    """

    number: int = 0
    done: int = 0
    lossless: bool = True
    listing_bytes: int = 0
    measured_bytes: int = 0
    lost_bytes: int = 0
    measured_tokens: int = 0
    unknown_tokens: int = 0
    lossy_example: str = ""
    counts: dict[str, list[int]] = field(default_factory=lambda: {"train": [0, 0], "heldout": [0, 0]})
    writers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Writes the state, whole or not at all."""
        place_file(folder / PROGRESS, json.dumps(asdict(self)).encode())

    @classmethod
    def load(cls, folder: Path) -> PackState:
        """The saved state; the beginning where there is none."""
        try:
            return cls(**json.loads((folder / PROGRESS).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return cls()


def work_folder(out: Path, signature: str) -> Path:
    """The folder to pack in: what a dead process of this machine left of the same packing, or a new one.

    The name says whose it is, OUT.tmp-SIGNATURE-HOST-PID; taking over is a rename, which only one process can do.
    """
    stem = f"{out.name}.tmp-{signature[:16]}-{_host()}-"
    own = out.with_name(f"{stem}{os.getpid()}")
    own.parent.mkdir(parents=True, exist_ok=True)
    for other in out.parent.glob(f"{out.name}.tmp-*-{_host()}-*"):  # of packings from other inputs, given up
        pid = other.name.rpartition("-")[2]
        if not other.name.startswith(stem) and pid.isdecimal() and not _alive(int(pid)):
            shutil.rmtree(other, ignore_errors=True)
    for left in sorted(out.parent.glob(f"{stem}*")):
        pid = left.name.removeprefix(stem)
        if pid.isdecimal() and not _alive(int(pid)):
            try:
                left.rename(own)
            except OSError:
                continue  # another process was faster
            return own
    own.mkdir(exist_ok=True)
    return own


def _host() -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in socket.gethostname())


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
