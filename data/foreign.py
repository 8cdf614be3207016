"""Plain tar files without an index, read in the order in which they lie. NOT resumable.

For WebDatasets that somebody else wrote, to look at them or to train on them once: there is no plan, no checksum of a
document, no audit and no exactly-once, and a restart begins at the first document again. Pack the data
(`trimtab data pack`) to have all that. What counts as a document is said in `data.plain_tars`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator
from typing import Any

import numpy as np
import torch

from data.batches import Batches
from data.config import DataConfig
from data.errors import DataError
from data.ledger import format_hash, hash_sequences, ledger_line
from data.plain_tars import documents, plain_tars, shown, survey
from data.stream import MicroBatch, check_sizes
from data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

NOT_RESUMABLE = (
    'data.mode = "stream" reads plain tar files in their own order: it cannot be resumed, verified or audited; pack '
    'the data with `trimtab data pack` and use data.mode = "indexed" for that'
)


class ForeignStream:
    """Reads one rank's part of endlessly repeated tar files; `read` wants one step after the other, from any first one.

    Every rank goes through all documents and keeps every dp_size-th, so all ranks have the same, endless number of
    steps. The headers of all files are read before the first step. What is no document, or has no text, is counted and
    left out; each kind by its number, see `news`.

    Args:
        config: the `data` section, mode "stream"; path is a folder, a file or a pattern of tar files.
        dp_rank, dp_size, global_batch_size, micro_batch_size: as in Stream.

    Attributes:
        wait_seconds, total_wait_seconds: as in Stream; quarantined, n_quarantined: always empty and 0;
        n_documents: documents of the first pass so far, all ranks; n_left_out: members of the first pass so far that
            gave none, those that are never read included.
    """

    def __init__(
        self,
        config: DataConfig,
        dp_rank: int,
        dp_size: int,
        global_batch_size: int,
        micro_batch_size: int,
    ) -> None:
        problems = check_sizes(dp_size, dp_size, global_batch_size, micro_batch_size)
        if problems:
            raise DataError("; ".join(problems))
        self.tokenizer = foreign_tokenizer(config)
        self._files = plain_tars(config.path)[0]
        self._seq_len, self._dp_rank, self._dp_size = config.seq_len, dp_rank, dp_size
        self._micro_batch_size = micro_batch_size
        self.batches = self._batches = Batches.constant(global_batch_size)
        self._texts = self._read_texts()
        self._tokens = np.array([self.tokenizer.eod_id], np.int64)
        self._next_step: int | None = None
        self._consumed = 0
        self.wait_seconds = 0.0
        self.total_wait_seconds = 0.0
        self.quarantined: dict[int, str] = {}
        self.n_quarantined = 0
        self.n_documents = 0
        self.n_left_out = 0
        self._reasons: Counter[str] = Counter()
        self._read_files = 0
        self._passed = self._told = False

    def read(self, step: int) -> list[MicroBatch]:
        """The next micro-batches of this rank; sequence ids only number them.

        Raises:
            DataError: the step is not the one after the last, or no sample holds text.
        """
        if self._next_step is not None and step != self._next_step:
            raise DataError(f"step {step} was asked after step {self._next_step - 1}; {NOT_RESUMABLE}")
        started = time.perf_counter()
        ids = self._batches.numbers(step)[self._dp_rank :: self._dp_size]
        micro_batches = [
            self._assemble(ids[start : start + self._micro_batch_size])
            for start in range(0, len(ids), self._micro_batch_size)
        ]
        self._next_step = step + 1
        self._consumed = hash_sequences(ids)
        self.wait_seconds = time.perf_counter() - started
        self.total_wait_seconds += self.wait_seconds
        return micro_batches

    def epoch(self, step: int) -> int:
        """Always 0: where a pass over the files ends is not known."""
        return 0

    def ledger_hash(self, step: int) -> str:
        """Hash of the numbers of a step's sequences; it shows that no rank fell behind, not what was read."""
        return format_hash(hash_sequences(self._batches.numbers(step)))

    def consumed_hash(self, step: int) -> int:
        """This rank's part of `ledger_hash`, for the last step read."""
        return self._consumed

    def ledger_line(self, step: int, consumed: int) -> dict[str, Any]:
        """A line for ledger.jsonl whose plan says that it proves nothing about the data."""
        return ledger_line(step, 0, self._batches.numbers(step), consumed, "not resumable", ())

    def cursor(self, next_step: int) -> dict[str, Any]:
        """What a checkpoint keeps: the mode and the step, not a place in the data."""
        return {"mode": "stream", "next_step": next_step}

    def figures(self) -> dict[str, Any]:
        """What metrics.jsonl records of the first pass so far."""
        return {"documents": self.n_documents, "members_left_out": self.n_left_out}

    def check_cursor(self, cursor: dict[str, Any]) -> int:
        """Always refuses.

        Raises:
            DataError: there is no place to continue from.
        """
        raise DataError(f"the run cannot be resumed at step {cursor.get('next_step')}; {NOT_RESUMABLE}")

    def mix(self, step: int) -> int:
        """Always 0: there is no curriculum."""
        return 0

    def check_damage(self, total: int) -> int:
        """Always 0: nothing is checked."""
        return total

    def news(self, last: bool = False) -> dict[str, Any] | None:
        """What the first pass over the files used and left out, once, when it is over or the run is; else None.

        Args:
            last: nothing more is read, so that a pass that is not over is told too.
        """
        if self._told or not (self._passed or last):
            return None
        self._told = True
        reasons = ", ".join(f"{count} {reason}" for reason, count in self._reasons.most_common())
        how_far = f"the first pass over {len(self._files)} tar files is complete"
        if not self._passed:
            how_far = f"the run ends in the first pass, {self._read_files} of {len(self._files)} tar files are read"
        return {
            "cause": f"{how_far}: {self.n_documents} documents; left out: {reasons or 'nothing'}",
            "documents": self.n_documents,
            "left_out": self.n_left_out,
            "left_out_by_reason": dict(self._reasons),
        }

    def close(self) -> None:
        """Closes the open tar file."""
        self._texts.close()

    def __enter__(self) -> ForeignStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _assemble(self, ids: np.ndarray) -> MicroBatch:
        n, eod_id = self._seq_len, self.tokenizer.eod_id
        while len(self._tokens) < len(ids) * n + 1:
            where, text = next(self._texts)
            encoded = self.tokenizer.encode(text).astype(np.int64)
            if (encoded == eod_id).any():
                raise DataError(
                    f"{where}: its tokens hold the end-of-document token {eod_id} of {self.tokenizer.spec}, whose "
                    f"vocabulary holds that token's text as a word, and the document would be cut there; take the text "
                    f"out of the document, or train with another data.tokenizer"
                )
            self._tokens = np.concatenate((self._tokens, encoded, np.array([eod_id], np.int64)))
        taken = self._tokens[: len(ids) * n + 1]
        self._tokens = self._tokens[len(ids) * n :]
        tokens = taken[:-1].reshape(len(ids), n)
        doc_ids = np.cumsum(tokens == eod_id, axis=1)
        doc_ids -= doc_ids[:, :1]
        arrays = (
            tokens.copy(),
            taken[1:].reshape(len(ids), n).copy(),
            doc_ids,
            np.ones_like(tokens, bool),
            ids.copy(),
            np.ones_like(tokens, bool),
        )
        return MicroBatch(*(torch.from_numpy(array) for array in arrays))

    def _read_texts(self) -> Generator[tuple[str, str], None, None]:
        """Yields this rank's texts with their file and name, round and round."""
        contents = survey(self._files)
        number = 0
        while True:
            for file in self._files:
                for suffix, count in contents[file].others.items():
                    self._left_out(f"members {shown(suffix)}", count)
                for document in documents(file, contents[file]):
                    if document.text is None:
                        self._left_out(document.left_out, 1)
                        continue
                    number += 1
                    self.n_documents += not self._passed
                    if number % self._dp_size == self._dp_rank:
                        yield f"{file}: {document.name}", document.text
                self._read_files += not self._passed
            if not number:
                raise DataError(f"{self._files[0]} and on: no file holds a text any more; they changed since the start")
            self._passed = True

    def _left_out(self, reason: str, count: int) -> None:
        if not self._passed:
            self.n_left_out += count
            self._reasons[reason] += count


def foreign_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer of mode "stream": data.tokenizer, "bytes" or a tokenizer.json.

    Raises:
        DataError: the file is not a tokenizer.
    """
    return ByteTokenizer() if config.tokenizer == "bytes" else load_tokenizer(config.tokenizer)
