"""The corpora that every machine has: the source of the Python installation that is running."""

from __future__ import annotations

import os
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path

_LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"})


@dataclass(frozen=True)
class BuiltinCorpus:
    """A corpus known by name.

    Attributes:
        name: what a user types; also the folder below `datasets/`.
        tokenizer: the tokenizer it is packed with on demand.
        licence: SPDX name.
        shard_mb: shard size on demand, in MiB.
    """

    name: str
    tokenizer: str
    licence: str
    shard_mb: float

    def origin(self) -> str:
        """What the documents are, for the manifest."""
        return f"Python {platform.python_version()} standard library"

    def root(self) -> Path:
        """The folder of the running Python's standard library (not of a virtual environment)."""
        return Path(sysconfig.get_path("stdlib"))

    def files(self) -> list[tuple[str, Path]]:
        """(name, path) of every source file by sorted name, without tests, packages and build records.

        The character tables of `encodings`, some 70 files, are left out too: most are generated and differ in a few
        rows only, so that held-out ones would measure memory, and they made a tenth of the text.
        """
        root = self.root()
        found = []
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in _LEFT_OUT]
            for name in files:
                # _sysconfigdata*.py holds the compiler flags and paths of one build, not source
                if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                    path = Path(folder, name)
                    if folder.endswith("encodings") and _is_character_table(path):
                        continue
                    found.append((path.relative_to(root).as_posix(), path))
        return sorted(found)


def _is_character_table(path: Path) -> bool:
    """Whether a codec's file is a table of characters rather than code."""
    content = path.read_bytes()
    return b"decoding_table" in content or b"decoding_map" in content


BUILTIN_CORPORA = {
    corpus.name: corpus
    for corpus in (
        BuiltinCorpus("python", "bpe:4096", "PSF-2.0", 2),
        BuiltinCorpus("python-bytes", "bytes", "PSF-2.0", 8),
    )
}
