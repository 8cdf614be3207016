"""The console: plain rows at the right moments, a live bar that stays on one line, times and sizes for people."""

import io
import sys

import pytest

from launch.console import Console, duration, quantity


def record(step: int, **figures: float | None) -> dict[str, float | None]:
    plain = {"loss": 4.25, "tokens_per_second": 2000.0, "step_seconds": 2.0, "max_vio": 0.5, "data_wait_seconds": 0.1}
    return {"step": step, **plain, **figures}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain_lines(steps: int, seconds_a_step: float, total: int) -> list[str]:
    stream, clock = io.StringIO(), Clock()
    console = Console(total, stream=stream, clock=clock)
    for step in range(1, steps + 1):
        console.step(record(step))
        clock.now += seconds_a_step
    console.close()
    return stream.getvalue().splitlines()


def test_a_stream_that_is_no_terminal_gets_plain_aligned_rows() -> None:
    header, *rows = plain_lines(20, 1.0, 20)
    assert header.split() == ["step", "loss", "tokens/s", "max_vio", "data", "wait", "time", "left"]
    assert [row.split()[0] for row in rows] == ["1/20", "6/20", "11/20", "16/20", "20/20"]
    assert rows[0].split() == ["1/20", "4.2500", "2k", "0.500", "5.0%", "0:38"]
    assert rows[-1].split()[-1] == "0:00"
    assert len({len(row) for row in [header, *rows]}) == 1


def test_rows_stay_aligned_in_very_long_runs() -> None:
    stream = io.StringIO()
    console = Console(100_000_000, stream=stream, every_s=0.0)
    for step in (1, 99_999_999, 100_000_000):
        console.step(record(step))
    assert len({len(line) for line in stream.getvalue().splitlines()}) == 1
    assert all(line.startswith(" ") for line in stream.getvalue().splitlines())


def test_the_first_and_the_last_step_always_get_a_row() -> None:
    assert [line.split()[0] for line in plain_lines(3, 0.01, 3)] == ["step", "1/3", "3/3"]


def test_the_heading_comes_again_in_a_long_log() -> None:
    assert sum(line.split()[0] == "step" for line in plain_lines(100, 10.0, 1000)) == 4


def test_the_time_left_is_not_moved_by_one_slow_step() -> None:
    console = Console(110, stream=io.StringIO())
    for step in range(1, 11):
        console.step(record(step, step_seconds=100.0 if step == 5 else 2.0))
    assert console.seconds_left(10) == pytest.approx(200.0)


def test_figures_that_are_missing_or_not_numbers_are_shown_as_such() -> None:
    stream = io.StringIO()
    Console(9, stream=stream).step(record(1, loss=float("nan"), max_vio=None, tokens_per_second=None))
    assert stream.getvalue().splitlines()[1].split()[:4] == ["1/9", "nan", "0", "-"]
    stream = io.StringIO()
    Console(9, stream=stream).step({"step": 1, "loss": 2.0})
    assert stream.getvalue().splitlines()[1].split() == ["1/9", "2.0000", "-", "-", "-", "-"]


def test_notes_stand_between_the_rows() -> None:
    stream = io.StringIO()
    console = Console(9, stream=stream)
    console.note("start: trimtab train debug")
    console.step(record(1))
    console.note("save at step 1: asked for")
    assert [line.split()[0] for line in stream.getvalue().splitlines()] == ["start:", "step", "1/9", "save"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_live_bar_stays_on_one_line_and_notes_scroll_above_it(width: int) -> None:
    from rich.console import Console as RichConsole

    stream = io.StringIO()
    terminal = RichConsole(file=stream, force_terminal=True, width=width, color_system=None)
    console = Console(30000, mode="live", rich_console=terminal)
    console.step(record(1, loss=10.8123))
    console.note("save at step 100: every [100] steps")
    console.step(record(12345, max_vio=1.234, tokens_per_second=12345.0))
    console.close()
    output = stream.getvalue()
    assert "save at step 100: every [100] steps" in output  # not taken for markup
    last = output.replace("\x1b[2K", "\r").rsplit("\r", 1)[-1].split("\n")[0]
    for figure in ("12345/30000", "loss 4.2500", "tok/s", "max_vio 1.234", "9:48:30"):
        assert figure in last
    assert len(last) <= width
    assert ("wait 5.0%" in last) == (width >= 80)
    assert output.endswith("\x1b[?25h")  # the cursor is shown again


def test_a_terminal_gets_the_live_bar_where_rich_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    assert Console(9, stream=Terminal()).mode == "live"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert Console(9, stream=Terminal()).mode == "plain"
    monkeypatch.undo()
    monkeypatch.setenv("TERM", "dumb")
    assert Console(9, stream=Terminal()).mode == "plain"


def test_a_forced_live_bar_without_rich_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(ModuleNotFoundError, match="pip install rich"):
        Console(9, mode="live")


def test_off_shows_nothing() -> None:
    stream = io.StringIO()
    console = Console(9, stream=stream, mode="off")
    console.step(record(1))
    console.note("x")
    console.close()
    assert stream.getvalue() == ""


def test_quantities_and_durations() -> None:
    assert [quantity(x) for x in (0, 950, 9840, 99_960, 999_600, 1.254e6, 3e9)] == [
        "0", "950", "9.84k", "100k", "1M", "1.25M", "3B",
    ]  # fmt: skip
    assert [duration(s) for s in (0, 59.6, 298, 3723, 2 * 86400 + 11045, float("nan"))] == [
        "0:00", "1:00", "4:58", "1:02:03", "2d 03:04:05", "-",
    ]  # fmt: skip
