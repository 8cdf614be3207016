"""Whose checkpoints lie at a place: a run's identity in OWNER.json beside them and in every manifest. Needs no torch.

Two runs that keep checkpoints in one place would go on from, overwrite and delete each other's. A place therefore
belongs to the run that claimed it first, and what is another run's by its manifest is neither loaded nor deleted.
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from parallel.roots import Root

OWNER = "OWNER.json"


@dataclass(frozen=True)
class Identity:
    """A run.

    Attributes:
        id: 16 hex digits, drawn once.
        folder: the run's folder when this was written, for people.
        host: the machine that it was started on then, for people.
        earlier: ids of runs whose checkpoints this one took over: of the run that it is a copy of, for example.
    """

    id: str
    folder: str
    host: str = ""
    earlier: tuple[str, ...] = ()

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> "Identity":
        """From JSON. Raises: KeyError, TypeError where it is none."""
        return cls(
            str(told["id"]), str(told["folder"]), str(told.get("host", "")), tuple(map(str, told.get("earlier", ())))
        )

    def table(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def owns(self, run_id: str) -> bool:
        """Whether a checkpoint with this id is its own; "" is that of an older version, which wrote none."""
        return not run_id or run_id == self.id or run_id in self.earlier

    def __str__(self) -> str:
        return f"run {self.folder} (id {self.id}{f', on {self.host}' if self.host else ''})"


def run_id(manifest: Mapping[str, Any]) -> str:
    """The id of the run that saved a checkpoint; "" where its version did not say."""
    told = manifest.get("run")
    return str(told.get("id", "")) if isinstance(told, Mapping) else ""


def run_id_at(checkpoint: Root) -> str:
    """`run_id` of a published checkpoint; "" too where its manifest cannot be read."""
    try:
        return run_id(json.loads((checkpoint / "manifest.json").read_text()))
    except (OSError, ValueError, AttributeError):
        return ""


def owner_of(root: Root) -> Identity | None:
    """Who claimed a place; None where nobody has.

    Raises:
        OSError: the storage does not answer, or OWNER.json holds no identity.
    """
    for _ in range(20):
        try:
            text = (root / OWNER).read_text()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if text.strip():
            try:
                return Identity.of(json.loads(text))
            except (ValueError, KeyError, TypeError) as error:
                raise OSError(f"{root / OWNER} does not say whose checkpoints these are ({error!r})") from error
        time.sleep(0.02)  # another driver is writing it just now
    return None  # nobody is: whoever made it died before it was written


def claim(root: Root, identity: Identity, before: Identity | None) -> Identity:
    """Writes that a place belongs to a run; returns whose it is afterwards: of two that claim at once, one wins.

    Args:
        before: the owner that is to be replaced, None where there was none.

    Raises:
        OSError: it cannot be written.
    """
    text = json.dumps(identity.table()) + "\n"
    if not isinstance(root, Path):  # nothing is exclusive there: of two at the same moment the later one has it
        found = owner_of(root)
        if found is None or (before is not None and found.id == before.id):
            (root / OWNER).write_bytes(text.encode())
        return owner_of(root) or identity
    root.mkdir(parents=True, exist_ok=True)
    draft = root / f".{OWNER}.{os.getpid()}"
    draft.write_text(text, encoding="utf-8")
    try:
        if before is None and owner_of(root) is None and not (root / OWNER).exists():
            try:
                os.link(draft, root / OWNER)  # fails where another was faster
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                draft.replace(root / OWNER)
        else:
            found = owner_of(root)
            if found is None or (before is not None and found.id == before.id):
                draft.replace(root / OWNER)
    finally:
        draft.unlink(missing_ok=True)
    return owner_of(root) or identity
