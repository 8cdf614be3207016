"""How a checkpoint comes to be: a snapshot of the state, each rank's file in a draft folder, then publication.

The draft is `.step-00000100.tmp`. Only when every rank has said that its file is on the disk does rank 0 write the
manifest and COMMIT and rename the folder, so that a published checkpoint is always whole. A caller may be told of the
places where a fault would hurt most, by name and in this order:

    before_write    every rank, before its file is made          (in the background where saving is asynchronous)
    mid_write       every rank, when half of its bytes are written
    before_commit   rank 0, all files and the manifest written, COMMIT not
    before_rename   rank 0, COMMIT written, the draft not yet renamed
    cleanup         rank 0, the new checkpoint published, before older ones are deleted

At an address nothing is renamed: the files are written where they stay, COMMIT last, and at `before_rename` the
checkpoint is published already.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from model.naming import pieces
from model.slots import local_experts
from parallel.checkpoint import FORMAT, CheckpointError, Experts
from parallel.communicator import Communicator
from parallel.engine import Engine, StateShard
from parallel.ownership import run_id_at
from parallel.remote import RemotePath
from parallel.roots import Root, is_address, new_name, step_folder
from parallel.safetensors_file import write

Point = Literal["before_write", "mid_write", "before_commit", "before_rename", "cleanup"]
Hook = Callable[[Point], None]
_SLACK = 1 << 20  # bytes for manifest, COMMIT and folder


def no_hook(point: Point) -> None:
    """Does nothing."""


class HostBuffer:
    """Host memory that one snapshot after the other is copied into; pinned where the state is on a GPU."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None  # (n,) fp32

    def copy(self, tensors: list[Tensor]) -> list[Tensor]:
        """Copies of 1-D fp32 tensors. They are overwritten by the next call."""
        sizes = [tensor.numel() for tensor in tensors]
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        if self._memory is None or self._memory.numel() < sum(sizes):
            self._memory = torch.empty(sum(sizes), dtype=torch.float32, pin_memory=on_gpu)
        copies = list(self._memory[: sum(sizes)].split(sizes)) if sizes else []
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor.detach(), non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.synchronize()
        return copies


@dataclass(frozen=True)
class Snapshot:
    """One rank's share of the state.

    tensors: (key in the file, (n,) fp32 values). runs: for each, [logical name, shape, kind, start, n].
    """

    tensors: list[tuple[str, Tensor]]
    runs: list[list[Any]]

    @property
    def n_bytes(self) -> int:
        """Of the values; the file's header comes on top."""
        return sum(values.numel() * values.element_size() for _, values in self.tensors)


def snapshot(engine: Engine, biases: Mapping[str, Tensor], rank: int, buffer: HostBuffer | None = None) -> Snapshot:
    """This rank's share of weights and moments, and on rank 0 the routing biases.

    Args:
        biases: by logical name, the same on every rank.
        buffer: where the values are copied to, so that training may go on; None gives views of the live state.
    """
    tensors: list[tuple[str, Tensor]] = []
    runs: list[list[Any]] = []
    experts = local_experts(engine.module)
    for shard in engine.state_shards():
        for name, shape, start, values in _logical_runs(shard, experts):
            tensors.append((f"{name}/{shard.kind}@{start}", values))
            runs.append([name, list(shape), shard.kind, start, values.numel()])
    for name, bias in biases.items() if rank == 0 else ():
        tensors.append((f"{name}/weight@0", bias.view(-1)))
        runs.append([name, list(bias.shape), "weight", 0, bias.numel()])
    if buffer is not None:
        copies = buffer.copy([values for _, values in tensors])
        tensors = [(key, copy) for (key, _), copy in zip(tensors, copies, strict=True)]
    return Snapshot(tensors, runs)


def _logical_runs(shard: StateShard, experts: Experts) -> list[tuple[str, tuple[int, ...], int, Tensor]]:
    """Cuts a shard at the borders of logical tensors: (logical name, shape, start in that tensor, values)."""
    stop = shard.start + shard.values.numel()
    runs = []
    for piece in pieces(shard.parameter, shard.shape, experts.get(shard.parameter, ())):
        first, last = max(shard.start, piece.start), min(stop, piece.start + piece.numel)
        if first < last:
            values = shard.values[first - shard.start : last - shard.start]
            runs.append((piece.logical_name, tuple(piece.shape), first - piece.start, values))
    return runs


def draft_folder(root: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is written before it is published."""
    return root / f".step-{step:08d}.tmp"


def open_draft(root: Root, step: int, n_bytes: int, communicator: Communicator) -> Root:
    """Makes an empty draft folder, if the checkpoint will fit on the disk; collective.

    At an address it is the name of the checkpoint itself, new to everybody; how much fits there nobody can say.

    Args:
        n_bytes: what this rank is going to write.

    Raises:
        CheckpointError: on every rank, when the folder cannot be made or any rank sees too little free space.
    """
    if isinstance(root, RemotePath):
        return _open_remote(root, step, communicator)
    draft = draft_folder(root, step)
    error = ""
    if communicator.rank == 0:
        try:
            if draft.exists():
                shutil.rmtree(draft)
            draft.mkdir(parents=True)
        except OSError as wrong:
            error = f"rank 0 could not make {draft}: {wrong}"
    told = communicator.gather({"bytes": n_bytes, "free": free_bytes(root), "error": error})
    needed = sum(one["bytes"] for one in told) + _SLACK
    errors = [one["error"] for one in told if one["error"]]
    errors += [
        f"rank {rank} sees {one['free'] / 2**20:,.0f} MiB free at {root}, and the checkpoint of step {step} needs "
        f"{needed / 2**20:,.0f} MiB"
        for rank, one in enumerate(told)
        if one["free"] < needed
    ]
    raise_together(errors, draft, communicator.rank)
    return draft


def _open_remote(root: RemotePath, step: int, communicator: Communicator) -> RemotePath:
    told = {"name": "", "error": ""}
    if communicator.rank == 0:
        try:
            told["name"] = new_name(root, step)
        except OSError as wrong:
            told["error"] = f"rank 0 could not list {root}: {wrong}"
    first = communicator.gather(told)[0]
    raise_together([first["error"]] if first["error"] else [], None, communicator.rank)
    return root / first["name"]


def final_folder(draft: Root, root: Root, step: int) -> Root:
    """What a draft is called once it is published."""
    return draft if is_address(draft) else step_folder(root, step)


def free_bytes(folder: Path) -> int:
    """What this process may still write at a folder that need not be there yet; a huge number where nobody can say."""
    for place in (folder, *folder.absolute().parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return 2**62


def write_share(draft: Root, rank: int, share: Snapshot, hook: Hook = no_hook) -> dict[str, Any]:
    """Writes this rank's file and flushes it to the disk; no other rank is needed, so any thread may do it.

    Returns:
        JSON-able, for `manifest`: file, size, sha256, runs; and `error`, a sentence where the disk refused.
    """
    file = f"rank-{rank:05d}.safetensors"
    report: dict[str, Any] = {"file": file, "runs": share.runs, "error": ""}
    try:
        hook("before_write")
        report |= write(draft / file, share.tensors, lambda: hook("mid_write"))
    except OSError as error:
        report["error"] = f"rank {rank} could not write {draft / file}: {error}"
    return report


def remove_drafts(drafts: Iterable[Root]) -> None:
    """Deletes folders that were never published; one that cannot be deleted does no harm."""
    for draft in drafts:
        if isinstance(draft, RemotePath):
            with suppress(OSError):
                draft.remove_tree()
        else:
            shutil.rmtree(draft, ignore_errors=True)


def raise_together(errors: list[str], draft: Root | None, rank: int) -> None:
    """Removes the draft, if any, and raises, if there is any error; `errors` must be the same on every rank.

    Raises:
        CheckpointError: on every rank.
    """
    if errors:
        if rank == 0 and draft is not None:
            remove_drafts([draft])
        raise CheckpointError("; ".join(errors) + "; nothing was published, earlier checkpoints are as they were")


def manifest(step: int, reports: list[dict[str, Any]], extra: Mapping[str, Any]) -> dict[str, Any]:
    """What manifest.json holds, from the reports of all ranks."""
    tensors: dict[str, Any] = {}
    for report in reports:
        for name, shape, kind, start, numel in report["runs"]:
            entry = tensors.setdefault(name, {"shape": shape, "dtype": "F32", "runs": {}})
            entry["runs"].setdefault(kind, []).append([report["file"], start, numel])
    for entry in tensors.values():
        for runs in entry["runs"].values():
            runs.sort(key=lambda run: run[1])
    files = {report["file"]: {"size": report["size"], "sha256": report["sha256"]} for report in reports}
    return {"format": FORMAT, "step": step, **extra, "files": files, "tensors": dict(sorted(tensors.items()))}


def publish(
    draft: Root,
    final: Root,
    contents: dict[str, Any],
    hook: Hook = no_hook,
    owns: Callable[[str], bool] | None = None,
) -> None:
    """Turns a complete draft into the checkpoint `final`; rank 0 alone, once every rank's file is on the disk.

    Args:
        owns: whether a checkpoint of the run with this id may be replaced; None takes each for one's own.

    Raises:
        OSError: the disk refused; the draft is left, and what was published before is as it was.
    """
    text = json.dumps(contents, indent=1).encode()
    if isinstance(draft, RemotePath):
        _publish_remote(draft, text, contents["files"], hook)
        return
    assert isinstance(final, Path), f"{draft} is a folder, {final} is none"
    if owns is not None and final.exists() and not owns(run_id_at(final)):
        raise FileExistsError(f"{final} is a checkpoint of another run, of id {run_id_at(final)}")
    _write_flushed(draft / "manifest.json", text)
    _flush_folder(draft)
    hook("before_commit")
    _write_flushed(draft / "COMMIT", hashlib.sha256(text).hexdigest().encode())
    _flush_folder(draft)
    hook("before_rename")
    if final.exists():  # the same step again, after the run went back; `retention.recover` mends a crash in between
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        draft.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        draft.rename(final)
    _flush_folder(final.parent)


def _publish_remote(draft: RemotePath, text: bytes, files: Mapping[str, Any], hook: Hook) -> None:
    """COMMIT goes last: it is what makes the checkpoint one, and there is nothing to rename."""
    (draft / "manifest.json").write_bytes(text)
    there = draft.files()
    missing = [name for name, entry in files.items() if there.get(name) != entry["size"]]
    if missing:
        raise OSError(
            f"{draft} does not hold {', '.join(missing)} as written; see that all nodes reach the same storage there"
        )
    hook("before_commit")
    (draft / "COMMIT").write_bytes(hashlib.sha256(text).hexdigest().encode())
    hook("before_rename")


def _write_flushed(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(
    root: Root,
    step: int,
    engine: Engine,
    biases: Mapping[str, Tensor],
    extra: Mapping[str, Any],
    communicator: Communicator,
    hook: Hook = no_hook,
) -> Root:
    """Writes and publishes one checkpoint while everybody waits; collective over all ranks.

    Args:
        root: the folder of checkpoints, on storage that every rank sees.
        step: optimizer steps done.
        engine: whose state is saved.
        biases: routing bias by logical name, the same on every rank.
        extra: JSON-able: data cursor, configuration, random state ...; rank 0's is stored.
        communicator: all ranks.
        hook: told of the points that the module's docstring lists.

    Returns:
        The published folder.

    Raises:
        CheckpointError: on every rank when any rank could not write; what was published before is untouched.
    """
    share = snapshot(engine, biases, communicator.rank)
    draft = open_draft(root, step, share.n_bytes, communicator)
    final = final_folder(draft, root, step)
    reports = communicator.gather(write_share(draft, communicator.rank, share, hook))
    raise_together([report["error"] for report in reports if report["error"]], draft, communicator.rank)
    error = ""
    if communicator.rank == 0:
        try:
            publish(draft, final, manifest(step, reports, extra), hook)
        except OSError as wrong:
            error = f"rank 0 could not publish {final}: {wrong}"
    raise_together([error for error in communicator.gather(error) if error], draft, communicator.rank)
    return final
