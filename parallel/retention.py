"""Which checkpoints stay: the newest few and every n-th step; and what a crash in the middle left behind."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from parallel.ownership import run_id_at
from parallel.remote import RemotePath
from parallel.roots import Root, aside, committed, drafts, step_of
from parallel.saving import Hook, no_hook, remove_drafts


def kept_steps(steps: Iterable[int], keep: int, keep_every_steps: int = 0) -> set[int]:
    """The steps whose checkpoints stay.

    Args:
        steps: of the checkpoints that there are.
        keep: so many of the newest stay; 0 keeps all.
        keep_every_steps: besides, every multiple of it stays; 0 for none.
    """
    ordered = sorted(steps)
    newest = ordered[-keep:] if keep > 0 else ordered
    return {step for step in ordered if step in newest or (keep_every_steps > 0 and step % keep_every_steps == 0)}


def everybody(run_id: str) -> bool:
    """Every checkpoint is one's own."""
    return True


def prune(
    root: Root,
    keep: int,
    newest: int,
    keep_every_steps: int = 0,
    hook: Hook = no_hook,
    owns: Callable[[str], bool] = everybody,
) -> list[Root]:
    """Deletes what a run needs no more, just after it saved; returns what went, oldest first.

    Besides what `kept_steps` gives up, these go: drafts that a dead run left, and checkpoints of later steps. The
    latter are of a history that was given up, since the run went back before them, damaged ones above all; counted as
    the newest they would push out the readable ones.

    Args:
        newest: the step that was just saved.
        hook: told of `cleanup` before anything is deleted.
        owns: whether a checkpoint of the run with this id may be deleted; those of others stay and do not count.

    Raises:
        OSError: something could not be deleted; what is left is a checkpoint still, or is not one any more.
    """
    hook("cleanup")
    remove_drafts(drafts(root))
    found = {step_of(path): path for path in committed(root)}
    known: dict[int, bool] = {}  # step -> whether it is one's own; only manifests that matter are read
    while True:
        own = [step for step in found if known.get(step, True)]
        kept = kept_steps([step for step in own if step <= newest], keep, keep_every_steps)
        asked = {step for step in own if step not in kept} | set(sorted(kept)[-keep:] if keep > 0 else ())
        new = [] if owns is everybody else [step for step in asked if step not in known]
        known |= {step: owns(run_id_at(found[step])) for step in new}
        if all(known[step] for step in new):
            break
    gone = [found[step] for step in own if step not in kept]
    remove(gone)
    return gone


def remove(checkpoints: Iterable[Root]) -> None:
    """Deletes committed checkpoints; raises OSError like `prune`."""
    for path in checkpoints:
        (path / "COMMIT").unlink()  # first make it not a checkpoint, then remove it: never half a published one
        if isinstance(path, RemotePath):
            path.remove_tree()
        else:
            shutil.rmtree(path)


def recover(root: Root) -> list[Path]:
    """Puts a checkpoint back that was moved aside for a newer one of the same step which then was not published.

    That takes two renames, and a crash may come between them. Returns: the checkpoints that are there again; none at an
    address, where nothing is renamed.

    Raises:
        OSError: it cannot be renamed.
    """
    found = []
    for path in aside(root) if isinstance(root, Path) else []:
        final = path.with_name(path.name.removeprefix(".").removesuffix(".old"))
        if not final.exists():
            path.rename(final)
            found.append(final)
    return found
