"""A file system for fsspec that is as bare as an object store: no renaming, no folders, no append, late news.

Objects are files of the folder in OBJECT_STORE, under quoted names, so that several processes share them. An object is
there from its first byte on, cut off as it may be, which is worse than what stores promise; and a listing that was
asked for once is given again until the cache is dropped.
"""

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import fsspec
from fsspec.spec import AbstractFileSystem

ENTRY_POINT = "[fsspec.specs]\nobjects = tests.object_store:ObjectStore\nleaky = tests.object_store:LeakyStore\n"


class ObjectStore(AbstractFileSystem):
    """objects://anything/below; `before` is told of each operation and its object, and may raise or wait."""

    protocol = "objects"
    before: Callable[[str, str], None] = staticmethod(lambda operation, name: None)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._listed: dict[str, Any] | None = None

    @classmethod
    def file(cls, name: str) -> Path:
        """Where an object lies."""
        return Path(os.environ["OBJECT_STORE"], quote(name.strip("/"), safe=""))

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(path).removeprefix(f"{cls.protocol}://").strip("/")

    def _all(self) -> Iterator[dict[str, Any]]:
        for path in Path(os.environ["OBJECT_STORE"]).iterdir():
            yield {"name": unquote(path.name), "size": path.stat().st_size, "type": "file"}

    def find(self, path: str, maxdepth: Any = None, withdirs: bool = False, detail: bool = False, **more: Any) -> Any:
        self.before("find", path)
        if self._listed is None:
            self._listed = {info["name"]: info for info in self._all()}
        below = {name: info for name, info in self._listed.items() if f"{name}/".startswith(f"{path.strip('/')}/")}
        return below if detail else sorted(below)

    def invalidate_cache(self, path: str | None = None) -> None:
        self._listed = None

    def info(self, path: str, **more: Any) -> dict[str, Any]:
        self.before("info", path)
        file = self.file(path)
        if not file.is_file():
            raise FileNotFoundError(path)
        return {"name": path, "size": file.stat().st_size, "type": "file", "mtime": file.stat().st_mtime}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **more: Any) -> bytes:
        self.before("cat_file", path)
        return self.file(path).read_bytes()[start:end]

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """There are no folders."""

    def _open(self, path: str, mode: str = "rb", **more: Any) -> io.BufferedIOBase:
        assert mode == "wb", f"this store is read by ranges, not opened for {mode}"
        self.before("open", path)
        store = self

        class Object(io.FileIO):
            def write(self, content: Any) -> int:
                store.before("write", path)
                return super().write(content)

        return Object(self.file(path), "wb")

    def rm_file(self, path: str) -> None:
        self.before("rm_file", path)
        self.file(path).unlink()

    def mv(self, *paths: Any, **more: Any) -> None:
        raise io.UnsupportedOperation("objects cannot be renamed")

    rename = move = copy = cp_file = mv


class LeakyStore(ObjectStore):
    """leaky://: takes no more than whose place it is, and says why with every secret that it knows; with LEAKY_ALL in
    the environment it takes nothing at all."""

    protocol = "leaky"

    def _open(self, path: str, mode: str = "rb", **more: Any) -> io.BufferedIOBase:
        environment = os.environ
        if path.endswith("/OWNER.json") and "LEAKY_ALL" not in environment:
            return super()._open(path, mode, **more)
        print(f"opening {path} with {environment['PLANTED_SECRET_KEY']}", flush=True)
        raise PermissionError(
            f"denied: key {environment['PLANTED_SECRET_KEY']}, GET https://me:{environment['PLANTED_PASSWORD']}@host/x"
            f"?X-Amz-Signature={'5' * 64}, Authorization: Bearer {environment['PLANTED_TOKEN']}"
        )


def register() -> None:
    """Makes the addresses known in this process."""
    for store in (ObjectStore, LeakyStore):
        fsspec.register_implementation(store.protocol, store, clobber=True)


def register_for_children(folder: Path) -> None:
    """Makes them known in every process with this folder, and the project's root, on PYTHONPATH."""
    info = folder / "object_store-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: object-store\nVersion: 0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINT)
