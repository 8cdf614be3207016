"""The stream: this rank's micro-batches of a step, read from the shards, the next steps' read ahead of need."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from data import cursor as cursors
from data.batches import Batches
from data.cache import DocumentCache
from data.dataset import Dataset
from data.errors import DamagedSampleError, DataError
from data.ledger import format_hash, hash_sequences, ledger_line
from data.plan import Plan
from data.storage import is_remote

if TYPE_CHECKING:
    from data.mixture import MixedDataset, MixedPlan

_AHEAD = 2  # steps assembled in the background beyond the one that is asked for


class MicroBatch(NamedTuple):
    """What one rank feeds the model at once. B sequences of S tokens, CPU tensors unless moved.

    Attributes:
        tokens: (B, S) int64 inputs.
        targets: (B, S) int64, the token that follows each input.
        doc_ids: (B, S) int64, from 0 in each sequence, rising by one at each document's first place.
        loss_mask: (B, S) bool, False where the position is padding and must not count.
        sequence_ids: (B,) int64.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    doc_ids: torch.Tensor
    loss_mask: torch.Tensor
    sequence_ids: torch.Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MicroBatch:
        """The same micro-batch on a device."""
        return MicroBatch(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))


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
        self._cache = DocumentCache(dataset.train, cache_mb)
        self._remote = any(is_remote(one.path) for one in getattr(dataset, "datasets", (dataset,)))
        self._on_damage, self._damage_budget, self._timeout_s = on_damage, damage_budget, timeout_s
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="trimtab-data")
        self._pending: dict[int, Future[list[MicroBatch]]] = {}
        self._closed = threading.Event()
        self._consumed: tuple[int, int] | None = None
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
        ids = torch.cat([micro_batch.sequence_ids for micro_batch in micro_batches]).numpy()
        self._consumed = (step, hash_sequences(ids))
        if self.quarantined:
            self._masked.update(sequence for sequence in ids.tolist() if sequence in self.quarantined)
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
        return self._consumed[1]

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
        self._damage = [int(cursor.get("quarantined", 0)), 0]
        return step

    def close(self) -> None:
        """Stops the background reading."""
        self._closed.set()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _assemble_step(self, step: int) -> list[MicroBatch]:
        ids = self.global_ids(step)[self._dp_rank :: self._dp_size]
        if self._remote:
            self._dataset.train.prefetch(set().union(*map(self._plan.shards_near, ids.tolist())))
        return [
            self._assemble(ids[start : start + self._micro_batch_size])
            for start in range(0, len(ids), self._micro_batch_size)
        ]

    def _assemble(self, ids: np.ndarray, *, each_checked: bool = False) -> MicroBatch:
        """Reads and lays out the sequences of one micro-batch.

        Tokens are copied in their stored width, one token more than a sequence has targets, and both tensors are
        widened from that at once. The vocabulary is checked at once too: only if a token is outside it, everything is
        laid out again, `each_checked`, to find out whose it is.
        """
        n, seq_len = len(ids), self._plan.seq_len
        eod_id = self._dataset.manifest.eod_id
        stored = np.full((n, seq_len + 1), eod_id, self._dataset.train.dtype)
        doc_ids = np.zeros((n, seq_len), np.int64)
        contexts: list[tuple[int, int, int]] = []
        filled = []
        for row, sequence in enumerate(ids.tolist()):
            if self._closed.is_set():
                raise DataError("the stream was closed while it was read")
            try:
                n_targets, own_contexts = self._fill(sequence, stored[row], doc_ids[row], each_checked)
            except DamagedSampleError as error:
                if self._on_damage == "fail":
                    raise
                self.quarantined[sequence] = str(error)
                stored[row], doc_ids[row], n_targets, own_contexts = eod_id, 0, 0, []
            filled.append(n_targets)
            contexts += [(row, column, token) for column, token in own_contexts]
        if not each_checked and int(stored.max()) >= self._dataset.train.vocab_size:
            return self._assemble(ids, each_checked=True)
        tokens, targets = stored[:, :-1].astype(np.int64), stored[:, 1:].astype(np.int64)
        for row, column, token in contexts:
            tokens[row, column] = token
        mask = np.ones((n, seq_len), bool)
        for row, n_targets in enumerate(filled):
            if n_targets < seq_len:
                mask[row, n_targets:] = False
        return MicroBatch(*map(torch.from_numpy, (tokens, targets, doc_ids, mask, ids.copy())))

    def _fill(
        self, sequence: int, stored: np.ndarray, doc_ids: np.ndarray, checked: bool
    ) -> tuple[int, list[tuple[int, int]]]:
        """Lays out one sequence in rows (seq_len + 1,) of end tokens and (seq_len,) of zeros.

        Returns:
            How many targets it has, and (column, token) where the token in front of a piece is not the target before.
        """
        at = 0
        contexts = []
        for number, (shard, document, start, stop) in enumerate(self._plan.layout(sequence)):
            end = at + stop - start
            if start == 0:  # in front of it stands an end token: the document's before it, or padding
                text = self._cache.tokens(shard, document, 0, stop)
                stored[at + 1 : end + 1] = text
            else:
                text = self._cache.tokens(shard, document, start - 1, stop)
                if number:
                    contexts.append((at, int(text[0])))
                    stored[at + 1 : end + 1] = text[1:]
                else:
                    stored[: end + 1] = text
            if number:
                doc_ids[at:] = number
            if checked:
                self._dataset.train.check_vocabulary(shard, document, text)
            at = end
        return at, contexts


def check_sizes(lanes: int, dp_size: int, batches: int | Batches, micro_batch_size: int) -> list[str]:
    """Every violated rule among lanes, ranks and batch sizes, for use before anything is started.

    Args:
        lanes: data.lanes.
        dp_size: data-parallel ranks.
        batches: train.global_batch_size, or a Batches.
        micro_batch_size: train.micro_batch_size.
    """
    found = []
    if lanes % dp_size:
        found.append(
            f"data.lanes = {lanes} cannot be shared by {dp_size} data-parallel ranks; use a number of ranks that "
            f"divides it, or data.lanes = {lanes * dp_size}"
        )
    sizes = (batches,) if isinstance(batches, int) else tuple(phase.size for phase in batches.phases)
    for size in sizes:
        if size % (dp_size * micro_batch_size):
            found.append(
                f"train.global_batch_size = {size} cannot be cut into micro-batches of {micro_batch_size} on {dp_size} "
                f"data-parallel ranks; use a multiple of {dp_size * micro_batch_size}"
            )
    return found
