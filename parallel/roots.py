"""Where checkpoints lie: a folder or an address, and which of what is there was published. Needs no torch.

A folder's checkpoints are `step-00000100`, made by renaming a draft. At an address there is no renaming: files are
written where they stay, COMMIT last, and a save of the same step once more gets a name of its own, `step-00000100.1`;
of several published ones of one step the one with the highest number counts.
"""

import re
from pathlib import Path

from parallel.remote import RemotePath, is_remote

Root = Path | RemotePath
_STEP = re.compile(r"step-(\d{8})(?:\.(\d{1,6}))?")
_ASIDE = re.compile(r"\.(step-\d{8})\.old")
_LISTING_S = 120.0  # for finding and reading what is small, where nobody should wait as long as for a save


def root_of(path: str, deadline_s: float) -> Root:
    """The place that a path or an address names."""
    return RemotePath(path, deadline_s) if is_remote(path) else Path(path.removeprefix("file://"))


def quickly(root: Root) -> Root:
    """The same place for somebody who cannot wait long."""
    if isinstance(root, RemotePath):
        return RemotePath(root.address, min(root.deadline_s, _LISTING_S), root.inside)
    return root


def is_address(root: Root) -> bool:
    """Whether it is not a folder."""
    return isinstance(root, RemotePath)


def step_folder(root: Root, step: int) -> Root:
    """The folder of the checkpoint after `step` optimizer steps; at an address the first of its possible names."""
    return root / f"step-{step:08d}"


def step_of(path: Root) -> int:
    """The steps that a checkpoint's folder holds, by its name, also of one that is moved aside."""
    aside = _ASIDE.fullmatch(path.name)
    found = _STEP.fullmatch(aside[1] if aside else path.name)
    assert found is not None, f"{path} is not the folder of a checkpoint"
    return int(found[1])


def _order(name: str) -> tuple[int, int]:
    found = _STEP.fullmatch(name)
    assert found is not None, name
    return int(found[1]), int(found[2] or 0)


def committed(root: Root) -> list[Root]:
    """Every checkpoint that was published, oldest step first. Order is by step, never by file time.

    Raises:
        OSError: the storage of an address does not answer.
    """
    if isinstance(root, RemotePath):
        return [root / name for name in _newest_of_each(_names(root)[0])]
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _is_plain(path.name) and (path / "COMMIT").is_file()]
    return sorted(found, key=lambda path: path.name)


def readable(root: Root) -> list[Root]:
    """`committed`, and those that a crash left aside between two renames, which a run puts back when it goes on."""
    found = committed(root)
    if isinstance(root, Path) and root.is_dir():
        steps = {step_of(path) for path in found}
        found += [path for path in aside(root) if step_of(path) not in steps]
    return sorted(found, key=step_of)


def aside(root: Path) -> list[Path]:
    """Published checkpoints that were moved aside for a newer one of the same step, oldest first."""
    found = [path for path in root.iterdir() if _ASIDE.fullmatch(path.name)] if root.is_dir() else []
    return sorted(path for path in found if (path / "COMMIT").is_file())


def drafts(root: Root) -> list[Root]:
    """What was begun and not published, or is not the last of its step any more."""
    if isinstance(root, RemotePath):
        published, begun = _names(root)
        stay = set(_newest_of_each(published))
        return [root / name for name in sorted({*published, *begun} - stay)]
    return [*sorted(root.glob(".step-*"))] if root.is_dir() else []


def new_name(root: RemotePath, step: int) -> str:
    """A folder's name for a save of a step that nothing at the address has yet."""
    published, begun = _names(root)
    taken = [number for found, number in map(_order, published + begun) if found == step]
    return f"step-{step:08d}.{max(taken) + 1}" if taken else f"step-{step:08d}"


def newest_step(root: Root) -> int:
    """Step of the newest checkpoint that was published; 0 when there is none. Raises: OSError, see `committed`."""
    return max(map(step_of, readable(root)), default=0)


def _is_plain(name: str) -> bool:
    found = _STEP.fullmatch(name)
    return found is not None and found[2] is None


def _names(root: RemotePath) -> tuple[list[str], list[str]]:
    """Folders of checkpoints with and without COMMIT."""
    published: set[str] = set()
    begun: set[str] = set()
    for file in root.files():
        folder, _, name = file.partition("/")
        if _STEP.fullmatch(folder):
            (published if name == "COMMIT" else begun).add(folder)
    return sorted(published, key=_order), sorted(begun - published, key=_order)


def _newest_of_each(names: list[str]) -> list[str]:
    return list({_order(name)[0]: name for name in sorted(names, key=_order)}.values())
