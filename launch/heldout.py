"""Held-out loss in the course of training, by all ranks together; nothing of the training is changed by it.

The windows are those of the evaluation at the end (`launch.evaluate`), dealt to the ranks in turn. Every rank does as
many forwards as the others, with rows that do not count where it has fewer windows, since experts and sharded weights
need all ranks in each. No gradient, random number, bias count or place in the data is touched.
"""

# B batch, S window

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cluster.flag import StopFlag
from launch.config import Config, ConfigError, no_heldout
from launch.evaluate import Window, laid_out, windows_of
from launch.feed import Feed
from parallel.communicator import Communicator
from parallel.engine import Engine

TOKENS_TOGETHER = 4096  # of one forward, where training's micro-batches are smaller: without gradients they need less


@dataclass(frozen=True)
class HeldoutFigures:
    """What the held-out documents cost at one step, the same on every rank.

    loss: nats a token, NaN where the evaluation was not finished. bits_per_byte: of the raw text, None where tokens do
    not stand for all of it. seconds: that it took on this rank. finished: whether all windows were predicted.
    """

    loss: float
    bits_per_byte: float | None
    n_tokens: int
    seconds: float
    finished: bool

    def record(self) -> dict[str, float]:
        """For metrics.jsonl; without figures where the evaluation was not finished."""
        figures = {"evaluation_seconds": round(self.seconds, 6)}
        if self.finished:
            figures["heldout_loss"] = self.loss
            if self.bits_per_byte is not None:
                figures["heldout_bits_per_byte"] = self.bits_per_byte
        return figures

    def line(self, step: int) -> str:
        """For the console."""
        if not self.finished:
            return f"held-out at step {step}: given up after {self.seconds:.1f} s, since the run is asked to stop"
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.3f} bits per byte"
        return (
            f"held-out at step {step}: loss {self.loss:.4f} nats a token{bits} "
            f"({self.n_tokens:,} tokens, {self.seconds:.1f} s)"
        )


class Heldout:
    """One rank's share of the held-out windows.

    Args:
        every: steps between two evaluations, 0 for none. last: train.steps, behind which there is one as well.
        windows: of this rank. batches: forwards of every rank. rows: windows in a forward (B). window: tokens (S).
        raw_bytes: of all documents' text; 0 where bits per byte would not be true.
        ranks: all ranks. device: where this one computes.
    """

    def __init__(
        self, every: int, last: int, windows: list[Window], batches: int, rows: int, window: int, eod_id: int,
        raw_bytes: int, ranks: Communicator, device: torch.device,
    ) -> None:  # fmt: skip
        self.every, self.last = every, last
        self._windows, self._batches, self._rows = windows, batches, rows
        self._window, self._eod_id, self._raw_bytes = window, eod_id, raw_bytes
        self._ranks, self._device = ranks, device

    def due(self, step: int) -> bool:
        """Whether step `step`, 1-based, is followed by an evaluation."""
        return self.every > 0 and (step % self.every == 0 or step == self.last)

    @torch.no_grad()
    def measure(self, engine: Engine, stop: StopFlag, mark: Callable[[], None]) -> HeldoutFigures:
        """Predicts all held-out documents; collective.

        Args:
            engine: its model is read, and nothing else of it. stop: where it is set on any rank, the evaluation ends
                before the next forward. mark: called before each forward, so that a watcher sees progress.
        """
        began = time.perf_counter()
        nats, n_tokens, finished = 0.0, 0, True
        for number in range(self._batches):
            asked = self._ranks.all_reduce(torch.tensor([int(stop.is_set())], dtype=torch.int64))
            if int(asked):
                finished = False
                break
            mark()
            own = self._windows[number * self._rows : (number + 1) * self._rows]
            tokens, targets, counts = laid_out(own, self._rows, self._window, self._eod_id)
            tokens, targets = tokens.to(self._device), targets.to(self._device)
            losses = engine.forward(tokens=tokens, doc_ids=None, targets=targets).token_losses  # (B, S)
            nats += float(losses.double()[counts.to(self._device)].sum())
            n_tokens += int(counts.sum())
        total, counted = self._ranks.all_reduce(torch.tensor([nats, n_tokens], dtype=torch.float64)).tolist()
        seconds = time.perf_counter() - began
        if not finished:
            return HeldoutFigures(math.nan, None, int(counted), seconds, False)
        bits = total / math.log(2) / self._raw_bytes if self._raw_bytes else None
        return HeldoutFigures(total / max(1.0, counted), bits, int(counted), seconds, True)


def open_heldout(config: Config, feed: Feed, ranks: Communicator, device: torch.device) -> Heldout:
    """Reads the held-out documents of a run that evaluates as it trains.

    Raises:
        ConfigError: there are none. DataError: one is damaged.
    """
    every, window = config.train.evaluate_every_steps, config.data.seq_len
    rows = max(config.train.micro_batch_size, TOKENS_TOGETHER // window)
    if not every or feed.dataset is None:
        return Heldout(0, config.train.steps, [], 0, rows, window, 0, 0, ranks, device)
    eod_id = feed.dataset.manifest.eod_id
    own, n_windows, raw_bytes = [], 0, 0
    for document in feed.dataset.heldout_documents():
        raw_bytes += len(document.data)
        for one in windows_of(document, eod_id, window, max(1, window // 2)):
            if n_windows % ranks.size == ranks.rank:
                own.append(one)
            n_windows += 1
    if not n_windows:
        raise ConfigError([no_heldout(config)])
    batches = math.ceil(math.ceil(n_windows / ranks.size) / rows)
    return Heldout(
        every, config.train.steps, own, batches, rows, window, eod_id,
        raw_bytes if feed.dataset.lossless else 0, ranks, device,
    )  # fmt: skip
