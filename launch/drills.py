"""Lets a rank have the faults of `faults.inject` at the places that `launch.faults` describes."""

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from data.errors import DataError
from launch.around import Around
from launch.faults import Fault, parse
from launch.runfolder import JsonLines, read_records, utc_now
from model.exchange import Exchange
from model.naming import is_expert


class DrillError(Exception):
    """What the fault `raise` raises."""


class Faults:
    """The faults of one rank; without any, each place costs one comparison with an empty tuple.

    Args:
        text: `faults.inject`. rank: this rank. record: faults.jsonl of the run. generation: of this process.
    """

    def __init__(self, text: str = "", rank: int = 0, record: Path | None = None, generation: int = 0) -> None:
        self._mine = tuple(fault for fault in parse(text)[0] if fault.rank == rank)
        self._record = JsonLines(record) if record and self._mine else None
        self._rank, self._generation = rank, generation
        self._step: int | None = None
        self._struck: dict[str, int] = {}
        for line in read_records(record) if record and self._mine else ():
            if line["rank"] == rank:
                self._struck[line["fault"]] = self._struck.get(line["fault"], 0) + 1

    def at(self, phase: str, step: int | None = None, *, at: str = "", module: nn.Module | None = None) -> None:
        """A place where faults may strike.

        Args:
            step: 1-based; None before the first. at: the point of a save.
            module: the model. In phase backward the fault strikes when a gradient in its middle is computed.
        """
        if not self._mine:
            return
        if phase != "save":  # which another thread may be doing meanwhile
            self._step = step
        for fault in self._mine:
            if not fault.strikes(phase, step, at):
                continue
            if phase == "backward" and module is not None:
                self._hook(fault, module)
            elif self._note(fault, step):
                _strike(fault, module)

    def wrap(self, exchange: Exchange) -> Exchange:
        """The exchange, with the place of phase `exchange` in front of each layer's transfers."""
        wanted = any(fault.phase == "exchange" for fault in self._mine)
        return Around(exchange, self._in_exchange) if wanted else exchange

    @contextmanager
    def _in_exchange(self) -> Iterator[None]:
        self.at("exchange", self._step)
        yield

    def save_hook(self, step: int) -> Callable[[str], None]:
        """What a save calls at each of its points, from whatever thread. step: the step that is saved."""
        return lambda point: self.at("save", step, at=point)

    def _note(self, fault: Fault, step: int | None) -> bool:
        """Whether it may strike once more; noted before it does, since it may be the last that this process does."""
        struck = self._struck.get(fault.text, 0)
        if fault.times and struck >= fault.times:
            return False
        self._struck[fault.text] = struck + 1
        if self._record and (fault.times or not struck):  # what strikes always is noted once
            self._record.append(
                {"time": utc_now(), "at": time.time(), "fault": fault.text, "rank": self._rank,
                 "generation": self._generation, "step": step}
            )  # fmt: skip
        return True

    def _hook(self, fault: Fault, module: nn.Module) -> None:
        named = [(name, one) for name, one in module.named_parameters() if one.requires_grad]
        if fault.kind == "nan":
            named = [(name, one) for name, one in named if is_expert(name)] or named
        parameter = named[len(named) // 2][1]

        def strike(gradient: torch.Tensor) -> torch.Tensor:
            handle.remove()
            if not self._note(fault, self._step):
                return gradient
            if fault.kind == "nan":
                gradient = gradient.clone()
                gradient.view(-1)[:1] = torch.nan
            else:
                _strike(fault, None)
            return gradient

        handle = parameter.register_hook(strike)


def _strike(fault: Fault, module: nn.Module | None) -> None:
    if fault.kind in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
    elif fault.kind in ("slow", "hang"):
        until = time.monotonic() + (fault.seconds or (1.0 if fault.kind == "slow" else float("inf")))
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))
    elif fault.kind == "full_disk":
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({fault.text})")
    elif fault.kind == "bad_read":
        raise DataError(f"a sample could not be read ({fault.text})")
    elif fault.kind == "flip" and module is not None:
        _flip(module)
    elif fault.kind == "clock":
        _set_clock(fault.seconds)
    else:
        raise DrillError(f"asked for by faults.inject = {fault.text!r}")


def _set_clock(seconds: float) -> None:
    """From now on this process's wall clock is off by so much (more); its monotonic clock and the machine's are not."""
    before = time.time
    time.time = lambda: before() + seconds


@torch.no_grad()
def _flip(module: nn.Module) -> None:
    """Turns over one bit of the mantissa of one number in a parameter that every rank holds."""
    names = [name for name, one in module.named_parameters() if not is_expert(name) and one.numel() > 1]
    values = dict(module.named_parameters())[names[len(names) // 2]].view(-1)[:1]
    width = {2: torch.int16, 4: torch.int32}[values.element_size()]
    values.view(width).bitwise_xor_(1 << (4 if width == torch.int16 else 20))
