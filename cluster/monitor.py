"""Watches one rank from outside and kills it when it hangs: `python -m cluster.monitor SPEC`, a child of the rank.

The rank's section file says where it is. When a section lasts longer than its limit, the monitors of all ranks take
their ranks' stacks; the one that asked for them tells which rank holds the others up, and the monitor of that rank
kills it. They speak through files in the run's folder of logs, each with the launch that it belongs to:

    hang.ask       {"launch", "round"}                       a monitor asks all others to look
    rank-N.look    {"launch", "round", "look"}               what a monitor saw of its rank
    hang.found     {"launch", "round", "ranks", "text"}      who hangs
    rank-N.hang    {"launch", "message"}                     this rank was killed because it hung
    rank-N.stacks  text                                      all stacks that were asked for

A rank that has not said yet where it is has no limit.
"""

import contextlib
import faulthandler
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.causes import STARTING, Place
from cluster.config import OWN_LIMITS, ClusterConfig
from cluster.context import RankContext
from cluster.places import parse_line, section_file
from cluster.stacks import Look, describe, odd_ones, read_spied, read_stacks

PERIOD_S = 0.25
ASLEEP_S = 2.0  # a longer gap between two looks means that this machine slept, its ranks too: not counted
ANSWER_S = 5.0  # for the stacks of a rank
GATHER_S = 12.0  # for what the other monitors saw
STACKS_SIGNAL = signal.SIGUSR2


def new_watch(spec: ClusterConfig, folder: Path) -> dict[str, Any] | None:
    """What the ranks of one launch are told of their monitors, JSON-able; None where no limit is set."""
    limits = {"start": spec.limit_start_s, "step": spec.limit_step_s, "save": spec.limit_save_s}
    for section in OWN_LIMITS:
        own = getattr(spec, f"limit_{section}_s")
        limits[section] = own if own is not None else limit_of(section, limits)
    if not any(limits.values()):
        return None
    return {"folder": str(Path(folder).resolve()), "launch": secrets.token_hex(8), "limits": limits}


def hang_of(watch: dict[str, Any] | None, rank: int) -> str:
    """Why the rank's monitor killed it; "" when it did not."""
    record = _read(Path(watch["folder"]) / f"rank-{rank}.hang", watch["launch"]) if watch else None
    return record["message"] if record else ""


def start_monitor(watch: dict[str, Any] | None, context: RankContext) -> subprocess.Popen | None:
    """Starts the monitor of this process, which from now on gives its stacks when asked.

    Returns:
        None where none is wanted; and where none can be started, which is said and does not end the rank.
    """
    if watch is None:
        return None
    folder = Path(watch["folder"])
    path = _stacks_file(folder, context.rank)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stacks = open(path, "a")  # noqa: SIM115 (stays open, for appending: the monitor writes to it as well)
        faulthandler.register(STACKS_SIGNAL, file=stacks, all_threads=True)
        spec = {
            **watch,
            "rank": context.rank,
            "world_size": context.world_size,
            "generation": context.generation,
            "pid": os.getpid(),
            "before": _text(section_file(folder, context.rank)),
        }
        return subprocess.Popen(
            [sys.executable, "-P", "-S", "-m", "cluster.monitor", json.dumps(spec)],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
            start_new_session=True,  # it has to outlive the rank's group for the moment in which it kills that
        )
    except OSError as error:
        print(f"rank {context.rank} goes on without a monitor: {error}", file=sys.stderr, flush=True)
        return None


def stop_monitor(monitor: subprocess.Popen | None) -> None:
    """Ends the monitor of a rank whose entry has ended."""
    if monitor is not None:
        monitor.kill()
        monitor.wait()


def limit_of(section: str, limits: dict[str, float]) -> float:
    """How many seconds a section may last; 0 is for ever."""
    return limits.get(section, limits["start" if section in STARTING else "step"])


class Monitor:
    """The state of one monitor.

    Args:
        spec: folder, launch, limits, rank, world_size, generation, pid of the rank, and before: what its section file
            held when it started.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec, self.folder, self.rank = spec, Path(spec["folder"]), spec["rank"]
        self.file = section_file(self.folder, self.rank)
        self.text: str = spec["before"]
        self.place: Place | None = None
        self.seconds = 0.0
        self._looked_at = time.monotonic()
        self._answered = self._found = 0
        self._ask_at = 0.0
        self._seen = ""  # the section file's text at the last answer

    def run(self) -> None:
        """Watches until the rank has ended: then this process has another parent."""
        while os.getppid() == self.spec["pid"]:
            try:
                self.tick()
            except OSError as error:  # a full disk, a folder that is away for a moment: the next look tries again
                print(f"the monitor of rank {self.rank}: {error}", file=sys.stderr, flush=True)
                time.sleep(10 * PERIOD_S)
            time.sleep(PERIOD_S)

    def tick(self) -> None:
        """One look at the rank and at what other monitors have to say."""
        self._update()
        asked = (self._record("hang.ask") or {"round": 0})["round"]
        mine = asked <= self._answered and self._look().is_over and time.monotonic() >= self._ask_at
        if mine:
            asked = max(asked, self._answered) + 1
            self._write("hang.ask", {"round": asked})
        if asked > self._answered:
            self._answer(asked)
            if mine:
                self._judge(asked)
        found = self._record("hang.found")
        if found and found["round"] > self._found:
            self._found = found["round"]
            self._update()
            if self.rank in found["ranks"] and self._text_at_answer() and self._look().is_over:
                self._kill(found["text"])

    def _update(self) -> None:
        now = time.monotonic()
        self.seconds += min(now - self._looked_at, ASLEEP_S)
        self._looked_at = now
        text = _text(self.file)
        if text != self.text:
            self.text, self.place, self.seconds = text, parse_line(text, self.spec["generation"]), 0.0

    def _look(self, **more: Any) -> Look:
        place = self.place or Place()
        limit_s = limit_of(place.section, self.spec["limits"]) if self.place else 0.0
        return Look(self.rank, place.section, place.step, round(self.seconds, 2), limit_s, **more)

    def _answer(self, number: int) -> None:
        self._answered, self._seen = number, self.text
        place = self.place or Place()
        state, stack, waits = self._stacks(f"section {place.section}, step {place.step or 0}, {self.seconds:.1f} s")
        look = self._look(state=state, stack=stack, waits=waits)
        if look.is_over:
            self._ask_at = time.monotonic() + max(1.0, look.limit_s / 4)
        self._write(f"rank-{self.rank}.look", {"round": number, "look": asdict(look)})

    def _judge(self, number: int) -> None:
        """Gathers what all saw and names the ranks that hang: those that are odd, and over their own limits."""
        looks: dict[int, Look] = {}
        deadline = time.monotonic() + GATHER_S
        while len(looks) < self.spec["world_size"] and time.monotonic() < deadline:
            for rank in set(range(self.spec["world_size"])) - set(looks):
                record = self._record(f"rank-{rank}.look")
                if record and record["round"] >= number:
                    looks[rank] = Look(**{**record["look"], "stack": tuple(record["look"]["stack"])})
            time.sleep(PERIOD_S / 5)
        missing = set(range(self.spec["world_size"])) - set(looks)
        odd, why = odd_ones(list(looks.values()), complete=not missing)
        hanging = [rank for rank in odd if looks[rank].is_over]
        text = f"{why}\n{describe(list(looks.values()))}"
        if missing:
            text += f"\nno word from the monitors of rank {', '.join(map(str, sorted(missing)))}"
        self._write("hang.found", {"round": number, "ranks": hanging, "text": text})

    def _text_at_answer(self) -> bool:
        """Whether the rank has not moved since this monitor took its stacks."""
        return self._seen == self.text

    def _kill(self, text: str) -> None:
        look = self._look()
        what = (
            f"hangs in section {look.section}, step {look.step or 0}: no progress for {look.seconds:.1f} s, "
            f"and {look.limit_s:g} s is the limit; {text}"
        )
        self._write(f"rank-{self.rank}.hang", {"message": what})
        pid = self.spec["pid"]
        if os.getppid() != pid:
            return
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
        else:  # it shares a group with others, as a worker of Ray does
            os.kill(pid, signal.SIGKILL)

    def _stacks(self, where: str) -> tuple[str, tuple[str, ...], bool]:
        """State, stack and whether the rank waits for others; see `Look`."""
        path, pid = _stacks_file(self.folder, self.rank), self.spec["pid"]
        with open(path, "a") as file:
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"--- {now}, generation {self.spec['generation']}, {where}, process {pid}\n")
        offset = path.stat().st_size
        if _is_stopped(pid):
            return "stopped", _spied(path, pid), False
        os.kill(pid, STACKS_SIGNAL)
        deadline, before = time.monotonic() + ANSWER_S, -1
        while time.monotonic() < deadline:
            time.sleep(PERIOD_S)
            size = path.stat().st_size
            if size > offset and size == before:  # all of it is there
                return ("running", *read_stacks(path.read_bytes()[offset:].decode(errors="replace")))
            before = size
        return "silent", (), False

    def _record(self, name: str) -> dict[str, Any] | None:
        return _read(self.folder / name, self.spec["launch"])

    def _write(self, name: str, record: dict[str, Any]) -> None:
        partial = self.folder / f".{name}.{os.getpid()}"
        partial.write_text(json.dumps({"launch": self.spec["launch"], **record}) + "\n")
        os.replace(partial, self.folder / name)


def _stacks_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.stacks"


def _text(path: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return path.read_text(errors="replace")
    return ""


def _read(path: Path, launch: str) -> dict[str, Any] | None:
    try:
        record = json.loads(_text(path) or "{}")
    except (OSError, ValueError):
        return None
    return record if record.get("launch") == launch else None


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:  # no Linux
        return False


def _spied(path: Path, pid: int) -> tuple[str, ...]:
    """The stack of a stopped process, which cannot give it itself; none without py-spy."""
    spy = shutil.which("py-spy")
    if spy is None:
        return ()
    with contextlib.suppress(subprocess.TimeoutExpired):
        found = subprocess.run(
            [spy, "dump", "--nonblocking", "--pid", str(pid)], capture_output=True, text=True, timeout=ANSWER_S
        )
        with open(path, "a") as file:
            file.write(found.stdout + found.stderr)
        return read_spied(found.stdout)
    return ()


if __name__ == "__main__":
    Monitor(json.loads(sys.argv[1])).run()
