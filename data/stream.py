"""The stream: this rank's micro-batches of a step, read from the shards, the next steps' read ahead of need."""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from data import cursor as cursors
from data.assemble import Assembler
from data.batches import Batches
from data.dataset import Dataset
from data.errors import DataError
from data.ledger import format_hash, hash_sequences, ledger_line
from data.plan import Plan
from data.provenance import Origin, origins
from data.storage import is_remote

if TYPE_CHECKING:
    from data.mixture import MixedDataset, MixedPlan

_AHEAD = 2  # steps assembled in the background beyond the one that is asked for
_TOKENS_TOGETHER = 1 << 17  # micro-batches are laid out together up to so many tokens


class MicroBatch(NamedTuple):
    """What one rank feeds the model at once. B sequences of S tokens, CPU tensors unless moved.

    Attributes:
        tokens: (B, S) int64 inputs.
        targets: (B, S) int64, the token that follows each input.
        doc_ids: (B, S) int64, from 0 in each sequence, rising by one at each document's first place.
        loss_mask: (B, S) bool, False where the position's target does not enter the loss, as at padding.
        sequence_ids: (B,) int64.
        real: (B, S) bool, False at padding and in a sequence that damage masks, where no document's token stands; None
            where every position holds one. A token whose target does not enter the loss is real all the same.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    doc_ids: torch.Tensor
    loss_mask: torch.Tensor
    sequence_ids: torch.Tensor
    real: torch.Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MicroBatch:
        """The same micro-batch on a device."""
        return MicroBatch(
            *(None if tensor is None else tensor.to(device, non_blocking=non_blocking) for tensor in self)  # type: ignore[arg-type]
        )


class Stream:
    """Reads one rank's part of every global batch; `read` is a pure function of the step.

    Args:
        dataset: opened, stays the caller's to close.
        plan: the order.
        dp_rank, dp_size: this rank among the data-parallel ranks; dp_size divides plan.lanes and the batch per
            micro-batch.
        global_batch_size: sequences of a step over all ranks (a Batches for sizes that change or skipped ranges).
        micro_batch_size: sequences that a rank feeds the model at once.
        cache_mb, on_damage, damage_budget: as in DataConfig.
        timeout_s: longest wait for one step's data.

    Attributes:
        wait_seconds: how long the last `read` waited for data; total_wait_seconds: all of them together.
        quarantined: sequence id -> what was wrong, for the sequences that were masked, read ahead or handed out.
        n_quarantined: how many of those `read` has handed out on this rank; the ranks' sum goes to `check_damage`.
    """

    def __init__(
        self,
        dataset: Dataset | MixedDataset,
        plan: Plan | MixedPlan,
        dp_rank: int,
        dp_size: int,
        global_batch_size: int | Batches,
        micro_batch_size: int,
        *,
        cache_mb: int = 256,
        on_damage: Literal["fail", "quarantine"] = "fail",
        damage_budget: float = 1e-5,
        timeout_s: float = 600.0,
    ) -> None:
        if plan.fingerprint != dataset.fingerprint:
            raise DataError(f"the plan is not of {dataset.path}; make it with data.mixture.plan_of")
        self._dataset, self._plan, self._dp_rank, self._dp_size = dataset, plan, dp_rank, dp_size
        if isinstance(global_batch_size, int):
            global_batch_size = Batches.constant(global_batch_size)
        self._batches = global_batch_size
        self._micro_batch_size = micro_batch_size
        problems = check_sizes(plan.lanes, dp_size, self._batches, micro_batch_size)
        if not 0 <= dp_rank < dp_size:
            problems.append(f"data-parallel rank {dp_rank} does not exist among {dp_size}")
        if problems:
            raise DataError("; ".join(problems))
        self._assembler = Assembler(dataset, plan, cache_mb)
        self._remote = any(is_remote(one.path) for one in getattr(dataset, "datasets", (dataset,)))
        self._on_damage, self._damage_budget, self._timeout_s = on_damage, damage_budget, timeout_s
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="trimtab-data")
        self._pending: dict[int, Future[list[MicroBatch]]] = {}
        self._consumed: tuple[int, list[torch.Tensor]] | None = None
        self.wait_seconds = 0.0
        self.total_wait_seconds = 0.0
        self.quarantined: dict[int, str] = {}
        self.n_quarantined = 0
        self._masked: set[int] = set()  # handed out; a set, since a rollback hands out again
        self._damage = [0, 0]  # sequences masked in all ranks: before this process, and since

    @property
    def batches(self) -> Batches:
        """The sizes and places of the global batches."""
        return self._batches

    def read(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of a step, one for each gradient accumulation step.

        Raises:
            DamagedSampleError: a sample is damaged (policy "fail"); names shard, key and offset.
            DataError: the data did not come in time.
        """
        started = time.perf_counter()
        wanted = range(step, step + 1 + _AHEAD)
        for other in [other for other in self._pending if other not in wanted]:
            self._pending.pop(other).cancel()
        for each in wanted:
            if each not in self._pending:
                self._pending[each] = self._executor.submit(self._assemble_step, each)
        try:
            micro_batches = self._pending.pop(step).result(self._timeout_s)
        except FutureTimeoutError as error:
            raise DataError(
                f"rank {self._dp_rank} waited {self._timeout_s:.0f} s for the data of step {step} in "
                f"{self._dataset.path}; check that the storage answers"
            ) from error
        self.wait_seconds = time.perf_counter() - started
        self.total_wait_seconds += self.wait_seconds
        self._consumed = step, [micro_batch.sequence_ids for micro_batch in micro_batches]
        if self.quarantined:
            ids = torch.cat(self._consumed[1]).tolist()
            self._masked.update(sequence for sequence in ids if sequence in self.quarantined)
            self.n_quarantined = len(self._masked)
        return micro_batches

    def check_damage(self, total: int) -> int:
        """Decides by the damage of all ranks, so that all decide alike; `cursor` saves the number from then on.

        Args:
            total: the ranks' sum of `n_quarantined`.

        Returns:
            The sequences masked since the run's beginning.

        Raises:
            DataError: they exceed data.damage_budget.
        """
        self._damage[1] = total
        masked, n_sequences = sum(self._damage), self._plan.n_sequences()
        allowed = max(1, int(self._damage_budget * n_sequences))
        if masked > allowed:
            own = f"; one of them: {next(iter(self.quarantined.values()))}" if self.quarantined else ""
            raise DataError(
                f"{masked} damaged sequences exceed data.damage_budget = {self._damage_budget} ({allowed} of "
                f"{n_sequences} sequences); `trimtab data verify {self._dataset.path}` names what to restore{own}"
            )
        return masked

    def use(self, batches: Batches, step: int = 0, plan: Plan | MixedPlan | None = None) -> None:
        """Takes other batch sizes or skipped ranges from now on; what was read ahead is read anew.

        Args:
            step: the next one; sizes that are over by then need not fit this number of ranks.
            plan: another order of the same sequences, None for the same one.

        Raises:
            DataError: a size that cannot be dealt to the ranks.
        """
        problems = check_sizes(self._plan.lanes, self._dp_size, batches, self._micro_batch_size, step)
        if problems:
            raise DataError("; ".join(problems))
        for ahead in self._pending.values():
            ahead.cancel()
        self._pending.clear()
        self._batches = batches
        self._plan = plan or self._plan

    @property
    def plan(self) -> Plan | MixedPlan:
        """The order."""
        return self._plan

    def mix(self, step: int) -> int:
        """The phase of the curriculum, from 0, that the last sequence of a step belongs to; 0 where there is none."""
        phase_of = getattr(self._plan, "phase_of", None)
        return 0 if phase_of is None else phase_of(int(self._batches.numbers(step)[-1]))

    def origins(self, sequences: Iterable[int], limit: int = 64) -> tuple[list[Origin], int]:
        """Shards and documents of sequences, see `data.provenance.origins`."""
        return origins(self._dataset, self._plan, sequences, limit)

    def epoch(self, step: int) -> int:
        """The epoch of a step's first sequence."""
        return self._plan.epoch_of(int(self._batches.numbers(step, 1)[0]))

    def global_ids(self, step: int) -> np.ndarray:
        """Sequence ids (G,) int64 of a step's global batch, the same on every rank."""
        return self._plan.sequence_ids(self._batches.numbers(step))

    def ledger_hash(self, step: int) -> str:
        """What the sum of all ranks' `consumed_hash` must be, as 16 hex digits: computed from the plan."""
        return format_hash(hash_sequences(self.global_ids(step)))

    def consumed_hash(self, step: int) -> int:
        """Hash of the sequences that the last `read` handed out on this rank, a signed 64-bit int to be summed over
        the ranks (int64, wrapping).

        Raises:
            DataError: the last `read` was of another step.
        """
        if self._consumed is None or self._consumed[0] != step:
            last = "nothing" if self._consumed is None else f"step {self._consumed[0]}"
            raise DataError(f"step {step} was not the last one read ({last} was); ask right after reading it")
        return hash_sequences(torch.cat(self._consumed[1]).numpy())

    def ledger_line(self, step: int, consumed: int) -> dict[str, Any]:
        """The line of ledger.jsonl for a step.

        Args:
            step: the step, counted from 0 as in `read`; the line counts steps done, from 1.
            consumed: the sum of all ranks' `consumed_hash(step)`.
        """
        return ledger_line(
            step,
            self.epoch(step),
            self._batches.numbers(step),
            consumed,
            self._plan.digest(),
            self._batches.skip_ranges,
        )

    def cursor(self, next_step: int) -> dict[str, Any]:
        """The cursor in front of a step, plain JSON values."""
        return {**cursors.make_cursor(self._plan, self._batches, next_step), "quarantined": sum(self._damage)}

    def check_cursor(self, cursor: dict[str, Any]) -> int:
        """Checks that a saved cursor continues this stream and returns its next step.

        Raises:
            DataError: another dataset, another order, or another batch size; names every difference.
        """
        cursors.check_cursor(cursor, self._plan)
        step, number = int(cursor["next_step"]), int(cursor["next_sequence"])
        here = int(self._batches.numbers(step, 1)[0])
        if here != number:
            raise DataError(
                f"the data cursor continues at sequence {number} with step {step}, but this run's batch sizes put that "
                f"step at sequence {here}; keep train.global_batch_size, or continue from the saved batches "
                f"(data.cursor.batches_of) with `then(step, size)`"
            )
        self.continue_from(cursor)
        return step

    def continue_from(self, cursor: dict[str, Any]) -> None:
        """Takes over what a cursor counts besides its place: the sequences masked so far."""
        self._damage = [int(cursor.get("quarantined", 0)), 0]

    def close(self) -> None:
        """Stops the background reading."""
        self._assembler.close()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _assemble_step(self, step: int) -> list[MicroBatch]:
        ids = self.global_ids(step)[self._dp_rank :: self._dp_size]
        if self._remote:
            self._dataset.train.prefetch(set().union(*map(self._plan.shards_near, ids.tolist())))
        size = self._micro_batch_size
        together = size * max(1, _TOKENS_TOGETHER // (size * self._plan.seq_len))
        return [
            micro_batch
            for start in range(0, len(ids), together)
            for micro_batch in self._assemble(ids[start : start + together])
        ]

    def _assemble(self, ids: np.ndarray) -> list[MicroBatch]:
        """Reads sequences (n,) together and cuts them into micro-batches."""
        rows = self._assembler.read(ids, self.quarantined if self._on_damage == "quarantine" else None)
        # What is laid out has a loss wherever a document's token stands: `real` is the loss mask here.
        tensors = (
            torch.from_numpy(array.reshape(-1, self._micro_batch_size, *array.shape[1:])).unbind()
            for array in (*rows, ids, rows.loss_mask)
        )
        return list(map(MicroBatch._make, zip(*tensors, strict=True)))


def check_sizes(lanes: int, dp_size: int, batches: int | Batches, micro_batch_size: int, step: int = 0) -> list[str]:
    """Every violated rule among lanes, ranks and batch sizes, for use before anything is started.

    Args:
        lanes: data.lanes.
        dp_size: data-parallel ranks.
        batches: train.global_batch_size, or a Batches.
        micro_batch_size: train.micro_batch_size.
        step: sizes that are over before it may be what they were.
    """
    found = []
    if lanes % dp_size:
        found.append(
            f"data.lanes = {lanes} cannot be shared by {dp_size} data-parallel ranks; use a number of ranks that "
            f"divides it, or data.lanes = {lanes * dp_size}"
        )
    sizes: tuple[int, ...]
    if isinstance(batches, int):
        sizes = (batches,)
    else:
        ends = [*(phase.step for phase in batches.phases[1:]), None]
        sizes = tuple(phase.size for phase, end in zip(batches.phases, ends, strict=True) if end is None or end > step)
    for size in sizes:
        if size % (dp_size * micro_batch_size):
            found.append(
                f"train.global_batch_size = {size} cannot be cut into micro-batches of {micro_batch_size} on {dp_size} "
                f"data-parallel ranks; use a multiple of {dp_size * micro_batch_size}"
            )
    return found
