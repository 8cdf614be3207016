"""Training progress on the console: a live bar on a terminal, aligned plain lines now and then anywhere else.

The plain lines also travel through the log of a submitted job, so each is whole and needs no cursor movement.
"""

import importlib.util
import math
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, TextIO

Mode = Literal["auto", "live", "plain", "off"]
RECENT_STEPS = 32  # speeds are means of so many steps; the time left is from their median, which a save does not move
HEADER_EVERY_ROWS = 30
ROOM_FOR_ALL = 78  # columns of a terminal below which the live line leaves out the bar and the data wait
HEADINGS = {"step": 14, "loss": 10, "tokens/s": 10, "max_vio": 9, "data wait": 11, "time left": 15}  # and their widths


class Renderer(Protocol):
    """What puts the figures on the screen."""

    def row(self, step: int, cells: dict[str, str]) -> None:
        """Takes one step's figures, already written out, under HEADINGS."""

    def note(self, text: str) -> None:
        """Takes a line of text that stands between the rows."""

    def close(self) -> None:
        """Leaves the terminal in order."""


class Console:
    """Shows the progress of a run of ``total_steps`` optimizer steps.

    Args:
        total_steps: train.steps; the record of this step is the last.
        stream: where to write; None is standard output as it is now.
        mode: auto is live on a terminal with rich installed, else plain; off shows nothing.
        every_s: seconds between plain rows; the first and the last step always get one.
        clock: the seconds that ``every_s`` is measured with.
        rich_console: the rich console to draw the live bar on instead of ``stream``.

    Raises: ModuleNotFoundError for mode live without rich.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        stream: TextIO | None = None,
        mode: Mode = "auto",
        every_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        rich_console: Any = None,
    ):
        stream = sys.stdout if stream is None else stream
        if mode == "auto":
            mode = "live" if _can_redraw(stream) else "plain"
        self.mode = mode
        self.total_steps = total_steps
        self._recent: deque[tuple[float, float, float]] = deque(maxlen=RECENT_STEPS)  # seconds, tokens, seconds waited
        self._renderer: Renderer | None = None
        if mode == "live":
            self._renderer = LiveBar(total_steps, stream, rich_console)
        elif mode == "plain":
            self._renderer = PlainRows(total_steps, stream, every_s, clock)

    def step(self, record: Mapping[str, Any]) -> None:
        """Shows one step's record (the keys of metrics.jsonl; a figure may be None or missing)."""
        step = int(record["step"])
        seconds = _known(record.get("step_seconds"))
        if seconds > 0:
            tokens = _known(record.get("tokens_per_second")) * seconds
            self._recent.append((seconds, tokens, _known(record.get("data_wait_seconds"))))
        if self._renderer is None:
            return
        busy, tokens, waited = (math.fsum(column) for column in zip(*self._recent or [(0.0, 0.0, 0.0)], strict=True))
        cells = {
            "step": f"{step}/{self.total_steps}",
            "loss": fixed(record.get("loss"), 4),
            "tokens/s": quantity(tokens / busy) if busy else "-",
            "max_vio": fixed(record.get("max_vio"), 3),
            "data wait": f"{100.0 * waited / busy:.1f}%" if busy else "-",
            "time left": duration(self.seconds_left(step)),
        }
        self._renderer.row(step, cells)

    def seconds_left(self, step: int) -> float:
        """Seconds from ``step`` to the last step at the recent pace; NaN before the first record."""
        pace = statistics.median(seconds for seconds, _, _ in self._recent) if self._recent else math.nan
        return max(0, self.total_steps - step) * pace

    def note(self, text: str) -> None:
        """Shows a line of text (an event) between the rows."""
        if self._renderer is not None:
            self._renderer.note(text)

    def close(self) -> None:
        """Leaves the terminal in order; the last figures stay on it."""
        if self._renderer is not None:
            self._renderer.close()


class PlainRows:
    """A heading, then a row about every ``every_s`` seconds and for the first and the last step."""

    def __init__(self, total_steps: int, stream: TextIO, every_s: float, clock: Callable[[], float]):
        self._total_steps, self._stream, self._every_s, self._clock = total_steps, stream, every_s, clock
        self._widths = {**HEADINGS, "step": max(HEADINGS["step"], 2 * len(str(total_steps)) + 2)}
        self._rows = 0
        self._next_row = -math.inf

    def row(self, step: int, cells: dict[str, str]) -> None:
        if self._clock() < self._next_row and step < self._total_steps:
            return
        if self._rows % HEADER_EVERY_ROWS == 0:
            self.note("".join(heading.rjust(width) for heading, width in self._widths.items()))
        self._rows += 1
        self._next_row = self._clock() + self._every_s
        self.note("".join(cells[heading].rjust(width) for heading, width in self._widths.items()))

    def note(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.flush()


class LiveBar:
    """One line that is redrawn: bar, step, loss, speed, balance, data wait, time left; notes scroll above it."""

    def __init__(self, total_steps: int, stream: TextIO, rich_console: Any = None):
        try:
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, Progress, TextColumn
        except ImportError as missing:
            raise ModuleNotFoundError(f"the live bar needs rich ({missing}): pip install rich, or use plain") from None
        console = rich_console or RichConsole(file=stream)
        wide = console.width >= ROOM_FOR_ALL
        columns: list[Any] = [
            TextColumn("[bold]{task.fields[step]}"),
            TextColumn("loss [bold]{task.fields[loss]}"),
            TextColumn("{task.fields[tokens/s]} tok/s"),
            TextColumn("max_vio {task.fields[max_vio]}"),
            TextColumn("[bold]{task.fields[time left]}[/]" + (" left" if wide else "")),
        ]
        if wide:
            columns.insert(1, BarColumn(bar_width=None))
            columns.insert(5, TextColumn("wait {task.fields[data wait]}"))
        self._total_steps = total_steps
        self._progress = Progress(*columns, console=console, expand=wide)

    def row(self, step: int, cells: dict[str, str]) -> None:
        fields: dict[str, Any] = dict(cells)
        if not self._progress.tasks:  # the bar appears with the first step: before it there is nothing to show
            self._progress.add_task("train", total=self._total_steps, completed=step, **fields)
            self._progress.start()
        else:
            self._progress.update(self._progress.task_ids[0], completed=step, **fields)

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()


def _can_redraw(stream: TextIO) -> bool:
    is_terminal = getattr(stream, "isatty", lambda: False)() and os.environ.get("TERM", "") not in ("", "dumb")
    return is_terminal and importlib.util.find_spec("rich") is not None


def _known(value: Any) -> float:
    """The figure, or 0 where it is missing or not a number."""
    return 0.0 if value is None or not math.isfinite(value) else float(value)


def fixed(value: Any, digits: int) -> str:
    """A figure with so many decimals; ``-`` when it is missing: ``8.3178``, ``nan``."""
    return "-" if value is None else f"{float(value):.{digits}f}"


def quantity(value: float) -> str:
    """A large figure short, in thousands, millions or billions: ``950``, ``9.8k``, ``1.25M``."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:  # 999,600 is 1M, not 1000k
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """A time as ``4:58`` (minutes), ``1:02:03`` (hours) or ``2d 03:04:05``; ``-`` when it is not known."""
    if not math.isfinite(seconds):
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}:{minute:02d}:{second:02d}"
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"
