"""Who encodes the batches of a packing: this process, several processes, or the ranks of an MPI job. The order, and so
every byte that is written, is the same."""

from __future__ import annotations

import json
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data.errors import DataError
from data.tokenizer import Tokenizer, load_tokenizer

Texts = Sequence[str]


class Encoding(Protocol):
    """Encodes batches of texts, in order.

    writes: whether this process is the one that writes the dataset.
    """

    writes: bool

    def share(self, value: Any) -> Any:
        """The writer's value (plain JSON data), on every process."""
        ...

    def encoded(self, batches: Iterable[Texts], tokenizer: Tokenizer) -> Iterator[list[np.ndarray]]:
        """Yields each batch's token ids, (n,) uint32 a text; nothing on processes that do not write."""
        ...


class HereEncoding:
    """Encodes in this process (the tokenizers library uses several threads by itself)."""

    writes = True

    def share(self, value: Any) -> Any:
        """The value."""
        return value

    def encoded(self, batches: Iterable[Texts], tokenizer: Tokenizer) -> Iterator[list[np.ndarray]]:
        """One batch after the other."""
        for batch in batches:
            yield tokenizer.encode_batch(batch)


class ProcessEncoding(HereEncoding):
    """Encodes in `workers` processes, which read the tokenizer's file themselves.

    Args:
        workers: processes, at least 1.
        file: the tokenizer's saved file, written before encoding begins.
    """

    def __init__(self, workers: int, file: Path) -> None:
        self._workers, self._file = workers, file

    def encoded(self, batches: Iterable[Texts], tokenizer: Tokenizer) -> Iterator[list[np.ndarray]]:
        """As many batches ahead as keep all processes busy."""
        context = multiprocessing.get_context("spawn")  # a fork would copy threads that hold locks
        with ProcessPoolExecutor(
            self._workers, context, _open, (str(self._file), tokenizer.spec, tokenizer.eod_id)
        ) as pool:
            waiting: deque[Future[list[np.ndarray]]] = deque()
            try:
                for batch in batches:
                    waiting.append(pool.submit(_encode, list(batch)))
                    if len(waiting) > 2 * self._workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()


class MpiEncoding:
    """Encodes on all ranks of an MPI job: batch i on rank i modulo their number; rank 0 writes.

    Every rank reads the sources itself, so all of them must see the same files.
    """

    def __init__(self, communicator: Any) -> None:
        self._comm = communicator
        self._rank, self._size = communicator.Get_rank(), communicator.Get_size()
        self.writes = self._rank == 0

    def share(self, value: Any) -> Any:
        """Rank 0's value; no rank goes on before all are here."""
        text = np.frombuffer(json.dumps(value).encode("utf-8") if self.writes else b"", np.uint8)
        size = np.array([len(text)], np.int64)
        self._comm.Bcast(size, root=0)
        buffer = text.copy() if self.writes else np.empty(int(size[0]), np.uint8)
        self._comm.Bcast(buffer, root=0)
        self._comm.Barrier()
        return json.loads(buffer.tobytes())

    def abort(self, status: int) -> None:
        """Ends all ranks: the others would wait for this one for ever."""
        self._comm.Abort(status)

    def encoded(self, batches: Iterable[Texts], tokenizer: Tokenizer) -> Iterator[list[np.ndarray]]:
        """On rank 0 every batch in order; the others send theirs and yield nothing."""
        for number, batch in enumerate(batches):
            owner = number % self._size
            if owner == self._rank:
                arrays = tokenizer.encode_batch(batch)
                if self.writes:
                    yield arrays
                else:
                    self._comm.Ssend(np.array([len(array) for array in arrays], np.int64), dest=0)
                    self._comm.Ssend(np.concatenate(arrays), dest=0)
            elif self.writes:
                sizes = np.empty(len(batch), np.int64)
                self._comm.Recv(sizes, source=owner)
                flat = np.empty(int(sizes.sum()), np.uint32)
                self._comm.Recv(flat, source=owner)
                yield np.split(flat, np.cumsum(sizes)[:-1])


def mpi_communicator() -> Any:
    """The communicator of all ranks.

    Raises:
        DataError: mpi4py is not installed, or no MPI library is there.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise DataError(f"packing under mpirun needs the package mpi4py and an MPI library ({error})") from error
    return MPI.COMM_WORLD


_tokenizer: list[Tokenizer] = []  # of a worker process: set once when it starts


def _open(file: str, spec: str, eod_id: int) -> None:
    _tokenizer[:] = [load_tokenizer(file, spec, eod_id=eod_id)]


def _encode(texts: list[str]) -> list[np.ndarray]:
    return _tokenizer[0].encode_batch(texts)
