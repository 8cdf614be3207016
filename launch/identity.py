"""Which run a folder is, and whether its place for checkpoints is its own.

identity.json in a run's folder holds the run's id. The id is also in the place of its checkpoints (OWNER.json) and in
every manifest. What happens to folders:

    moved                its identity goes along
    copied               the copy becomes a run of its own when it is next started; the checkpoints that lie inside it
                         are its own from then on; checkpoints outside stay the original's
    lost, checkpoints    a new folder at the same path goes on as that run; any other folder only with
    kept elsewhere       --accept-change checkpoint.dir
    of older versions    has no identity until it is next started; its checkpoints are its own
"""

import json
import os
import socket
from dataclasses import dataclass, replace
from pathlib import Path

from launch.config import Config, ConfigError, read
from launch.resume import checkpoint_root
from launch.runfolder import RunFolder
from parallel.ownership import Identity, claim, owner_of, run_id_at
from parallel.roots import Root, quickly, readable

_NAME = "identity.json"


@dataclass(frozen=True)
class Standing:
    """What a run may call itself, and how it stands to its place for checkpoints.

    identity: of the run, as it will be written when it starts. owner: who holds the place now, None where nobody does.
    problem: why the run must not use the place, else empty. notes: for people.
    """

    identity: Identity
    owner: Identity | None
    problem: str = ""
    notes: tuple[str, ...] = ()


def identity_of(folder: Path) -> Identity | None:
    """Of a run's folder; None where it has none yet.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        return Identity.of(json.loads((folder / _NAME).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            [f"{folder / _NAME} does not say which run this is ({error!r}); restore it, or give another --run"]
        ) from error


def standing(folder: Path, config: Config, accepted: tuple[str, ...] = ()) -> Standing:
    """Looks at a run's folder and its place for checkpoints; writes nothing.

    Args:
        accepted: "checkpoint.dir" among them lets a new run take over the checkpoints of a place.

    Raises:
        ConfigError: a file is damaged, or the address does not answer.
    """
    run, own = RunFolder(folder), identity_of(folder)
    root = checkpoint_root(config, run)
    inside = isinstance(root, Path) and root.resolve().is_relative_to(folder.resolve())
    key = f"checkpoint.dir = {config.checkpoint.dir or root}"
    try:
        owner = owner_of(quickly(root)) or (None if inside else _run_around(root))
        there = readable(quickly(root))
    except OSError as error:
        raise ConfigError([f"{key}: {error}"]) from error
    here, host = str(folder), socket.gethostname()
    original = own is not None and _original(own, folder)
    mine = Identity(own.id, here, host, own.earlier) if own else Identity(os.urandom(8).hex(), here, host)
    if inside:
        said: tuple[str, ...] = ()
        if own is not None and original:
            mine = _afresh(own, here, host)
            said = (f"run: {here} is a copy of {own.folder}: from here on it is a run of its own",)
        elif own is None:
            ids = {owner.id} if owner else {found for path in there if (found := run_id_at(path))}
            mine = replace(mine, earlier=tuple(sorted(ids)))
        if owner is not None and not mine.owns(owner.id):
            return Standing(mine, owner, _refusal(key, owner, mine))
        return Standing(mine, owner, notes=said)
    take = bool({"checkpoint", "checkpoint.dir"} & set(accepted))
    if own is not None and original:
        if owner is not None:
            return Standing(mine, owner, (
                f"{key}: the run folder {here} is a copy of {own.folder}, and both would keep their checkpoints there; "
                "give the copy a checkpoint.dir of its own, and copy step-* into it if it is to go on from them"
            ))  # fmt: skip
        own = mine = _afresh(own, here, host)
    if owner is None:
        ids = {run_id_at(path) for path in there}
        if not there or _kept_there(run, root) or (own is not None and all(found and own.owns(found) for found in ids)):
            return Standing(mine, None)
        if take:
            return Standing(replace(mine, earlier=tuple(sorted({*mine.earlier, *ids} - {""}))), None)
        return Standing(mine, None, (
            f"{key} holds {there[-1].name}, and nothing says of which run; {here} is a new one: give it a "
            "checkpoint.dir of its own, or go on from what is there with --accept-change checkpoint.dir"
        ))  # fmt: skip
    if own is not None:
        return Standing(mine, owner, "" if owner.id == own.id else _refusal(key, owner, mine))
    if owner.folder == here or (take and not run.is_run()):
        notes = (f"run: takes over the checkpoints in {root} of {owner}",) if there else ()
        return Standing(_afresh(owner, here, host), owner, notes=notes)
    return Standing(mine, owner, _refusal(key, owner, mine))


def take_place(folder: Path, config: Config, accepted: tuple[str, ...]) -> Identity:
    """Writes the run's identity into its folder and its place for checkpoints; the folder must be there.

    Raises:
        ConfigError: the place belongs to another run, or cannot be written.
    """
    found = standing(folder, config, accepted)
    if found.problem:
        raise ConfigError([found.problem])
    root = checkpoint_root(config, RunFolder(folder))
    key = f"checkpoint.dir = {config.checkpoint.dir or root}"
    draft = folder / f".{_NAME}.{os.getpid()}"
    try:
        if found.owner is None or found.owner != found.identity:
            winner = claim(quickly(root), found.identity, found.owner)
            if winner.id != found.identity.id:
                raise ConfigError([_refusal(key, winner, found.identity)])
        draft.write_text(json.dumps(found.identity.table()) + "\n", encoding="utf-8")
        draft.replace(folder / _NAME)
    except OSError as error:
        raise ConfigError([f"{key} or the run folder {folder} cannot be written: {error}"]) from error
    return found.identity


def _refusal(key: str, owner: Identity, mine: Identity) -> str:
    return (
        f"{key} belongs to the {owner}; this is the {mine}, and two runs in one place would go on from and delete "
        f"each other's checkpoints: give this run a checkpoint.dir of its own, or go on with that one: "
        f"--run {owner.folder}"
    )


def _afresh(before: Identity, here: str, host: str) -> Identity:
    """A run of its own that has taken over another one's checkpoints."""
    return Identity(os.urandom(8).hex(), here, host, tuple(dict.fromkeys((*before.earlier, before.id))))


def _original(own: Identity, folder: Path) -> bool:
    """Whether this folder is a copy: the one that the identity was written in is still there, as the same run."""
    other = Path(own.folder)
    try:
        if not (other / _NAME).is_file() or other.samefile(folder):
            return False
        found = identity_of(other)
    except (OSError, ConfigError):
        return False
    return found is not None and found.id == own.id


def _run_around(root: Root) -> Identity | None:
    """The run whose folder `checkpoints` this is, which has it without having said so."""
    if not isinstance(root, Path) or root.resolve().name != "checkpoints":
        return None
    around = root.resolve().parent
    if not RunFolder(around).is_run():
        return None
    return identity_of(around) or Identity("none yet, of an older version", str(around))


def _kept_there(run: RunFolder, root: Root) -> bool:
    """Whether a run of an older version has kept its checkpoints in this place."""
    if not run.is_run():
        return False
    before = read(str(run.config), [], [])
    return str(checkpoint_root(before, run)) == str(root)
