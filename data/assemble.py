"""Lays out sequences as rows of tokens, document ids and masks, many sequences with a few array operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data.cache import ROW_BITS, DocumentCache
from data.dataset import Dataset
from data.errors import DamagedSampleError
from data.plan import Plan

if TYPE_CHECKING:
    from data.mixture import MixedDataset, MixedPlan

# n sequences of S = seq_len targets, P pieces of documents in all of them


class Rows(NamedTuple):
    """Sequences laid out, as described in data.stream.MicroBatch.

    Attributes: tokens, targets, doc_ids: (n, S) int64; loss_mask: (n, S) bool.
    """

    tokens: np.ndarray
    targets: np.ndarray
    doc_ids: np.ndarray
    loss_mask: np.ndarray


class _Pieces(NamedTuple):
    """The pieces of n sequences, (P,) int64 each but `firsts` (n,).

    Attributes:
        firsts: the first piece of each sequence.
        numbers: the place of each piece in its sequence.
        documents: as DocumentCache numbers them.
        starts: the byte of each piece's first input; the document's bytes begin with the end token in front of it.
        lows, highs: the bytes of each piece that go into its row: its targets, with a first piece its first input too.
        lengths: targets.
    """

    firsts: np.ndarray
    numbers: np.ndarray
    documents: np.ndarray
    starts: np.ndarray
    lows: np.ndarray
    highs: np.ndarray
    lengths: np.ndarray


class Assembler:
    """Reads sequences of a plan from a dataset. For one thread, but for `close`.

    Args:
        dataset, plan: as for a Stream.
        cache_mb: memory for documents.
    """

    def __init__(self, dataset: Dataset | MixedDataset, plan: Plan | MixedPlan, cache_mb: int) -> None:
        self._train, self._plan, self._seq_len = dataset.train, plan, plan.seq_len
        self._dtype = np.dtype(dataset.train.dtype)
        self._eod_id = dataset.manifest.eod_id
        self._padding = memoryview(np.full(plan.seq_len + 1, self._eod_id, self._dtype).tobytes())
        self._columns = np.arange(plan.seq_len, dtype=np.int32)
        self._cache = DocumentCache(dataset.train, self._eod_id, cache_mb)

    def read(self, ids: np.ndarray, damage: dict[int, str] | None = None) -> Rows:
        """The rows of sequences (n,).

        Args:
            ids: sequence ids.
            damage: where it is given, sequences with a damaged sample are masked and noted here: id -> what is wrong.

        Raises:
            DamagedSampleError: a sample is damaged, and `damage` is not given.
        """
        pieces = self._locate(ids)
        try:
            return self._lay_out(pieces)
        except (DamagedSampleError, _OutsideVocabularyError):
            found = self._find_damage(ids, pieces, damage is None)
        assert damage is not None
        damage.update(found)
        shape = len(ids), self._seq_len
        rows = Rows(
            tokens=np.full(shape, self._eod_id, np.int64),
            targets=np.full(shape, self._eod_id, np.int64),
            doc_ids=np.zeros(shape, np.int64),
            loss_mask=np.zeros(shape, bool),
        )
        whole = np.array([sequence not in found for sequence in ids.tolist()])
        if whole.any():
            for masked, laid_out in zip(rows, self._lay_out(self._locate(ids[whole])), strict=True):
                masked[whole] = laid_out
        return rows

    def close(self) -> None:
        """Lets a reading in another thread end early."""
        self._cache.close()

    def _locate(self, ids: np.ndarray) -> _Pieces:
        table, width = self._plan.table(ids), self._dtype.itemsize
        firsts = np.searchsorted(table.sequence, np.arange(len(ids)))
        numbers = np.arange(len(table.sequence)) - firsts[table.sequence]
        return _Pieces(
            firsts=firsts,
            numbers=numbers,
            documents=(table.shard << ROW_BITS) | table.row,
            starts=table.start * width,
            # in front of a later piece stands the target before it, which is already there
            lows=(table.start + (numbers > 0)) * width,
            highs=(table.stop + 1) * width,
            lengths=table.stop - table.start,
        )

    def _lay_out(self, pieces: _Pieces) -> Rows:
        """Joins the stored bytes of all pieces to rows of one token more than a sequence has targets, checks these
        against the vocabulary, and widens them to both tensors, all at once."""
        n, seq_len, lengths = len(pieces.firsts), self._seq_len, pieces.lengths
        parts = self._parts(pieces.documents, pieces.lows, pieces.highs)
        filled = np.add.reduceat(lengths, pieces.firsts)  # (n,) targets of each sequence
        short = np.flatnonzero(filled < seq_len)
        if len(short):
            lasts = np.append(pieces.firsts[1:], len(parts))[short] - 1
            missing = seq_len - filled[short]
            for last, n_bytes in zip(
                lasts[::-1].tolist(), (missing[::-1] * self._dtype.itemsize).tolist(), strict=True
            ):
                parts.insert(last + 1, self._padding[:n_bytes])
            lengths = lengths.copy()
            lengths[lasts] += missing  # padding has the last document's id
        stored = np.frombuffer(b"".join(parts), self._dtype).reshape(n, seq_len + 1)
        if int(stored.max()) >= self._train.vocab_size:
            raise _OutsideVocabularyError
        tokens, targets = stored[:, :-1].astype(np.int64), stored[:, 1:].astype(np.int64)
        broken = np.flatnonzero((pieces.numbers > 0) & (pieces.starts > 0))
        if len(broken):  # a later piece that begins inside its document: its first input is no target in front of it
            starts = pieces.starts[broken]
            inputs = self._parts(pieces.documents[broken], starts, starts + self._dtype.itemsize)
            tokens.reshape(-1)[(np.cumsum(lengths) - lengths)[broken]] = np.frombuffer(b"".join(inputs), self._dtype)
        doc_ids = np.repeat(pieces.numbers, lengths).reshape(n, seq_len)
        mask = self._columns < filled.astype(np.int32)[:, None] if len(short) else np.ones((n, seq_len), bool)
        return Rows(tokens, targets, doc_ids, mask)

    def _parts(self, documents: np.ndarray, lows: np.ndarray, highs: np.ndarray) -> list[bytes | memoryview]:
        return self._cache.parts(documents.tolist(), lows.tolist(), highs.tolist())

    def _find_damage(self, ids: np.ndarray, pieces: _Pieces, fail: bool) -> dict[int, str]:
        """Reads piece by piece to find out whose the damage is."""
        found = {}
        columns: tuple[Sequence[int], ...] = tuple(
            column.tolist() for column in (pieces.documents, pieces.starts, pieces.highs)
        )
        owners = np.repeat(ids, np.diff(pieces.firsts, append=len(pieces.numbers))).tolist()
        for sequence, document, start, high in zip(owners, *columns, strict=True):
            try:
                tokens = np.frombuffer(self._cache.part(document, start, high), self._dtype)
                self._train.check_vocabulary(document >> ROW_BITS, document & ((1 << ROW_BITS) - 1), tokens)
            except DamagedSampleError as error:
                if fail:
                    raise
                found[sequence] = str(error)
        return found


class _OutsideVocabularyError(Exception):
    """Some token is outside the vocabulary."""
