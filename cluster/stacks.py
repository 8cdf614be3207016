"""Reads the stacks of ranks that hang and says which rank holds the others up: pure functions only."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

TOP_FRAMES = 4  # ranks whose innermost frames are the same wait in the same place
ENTRY = "run_entry"  # the function that every rank's work runs in
# Code that waits for other ranks, by parts of file names.
WAITING = ("/torch/distributed/", "/deepspeed/comm/", "/communicator.py")

_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+|\?\?\?) in (?P<function>.*)$')


@dataclass(frozen=True)
class Look:
    """What a monitor saw of its rank.

    step: 1-based, None before the first. seconds: in this section; limit_s: how many it may take, 0 for ever.
    state: "running", "stopped" (by a signal or a debugger) or "silent" (did not give its stacks).
    stack: of the thread that trains, "file:line function", innermost first. waits: for other ranks.
    """

    rank: int
    section: str
    step: int | None
    seconds: float
    limit_s: float
    state: str = "running"
    stack: tuple[str, ...] = ()
    waits: bool = False

    @property
    def is_over(self) -> bool:
        """Whether the section has lasted longer than it may."""
        return 0 < self.limit_s < self.seconds


def read_stacks(text: str) -> tuple[tuple[str, ...], bool]:
    """The stack of the thread that trains, in the text that faulthandler wrote, and whether it waits for other ranks.

    Returns:
        frames "file:line function", innermost first; none where the text has none.
    """
    threads: list[list[re.Match[str]]] = []
    for line in text.splitlines():
        if "most recent call first" in line:
            threads.append([])
        elif threads and (frame := _FRAME.match(line)):
            threads[-1].append(frame)
    if not any(threads):
        return (), False
    mine = max(threads, key=lambda frames: (any(frame["function"] == ENTRY for frame in frames), len(frames)))
    seen = list(mine)
    if "/torch/autograd/" in mine[0]["file"]:  # on a device, backward runs in threads of its own
        seen += [frame for frames in threads for frame in frames]
    waits = any(part in frame["file"] for frame in seen for part in WAITING)
    return tuple(f"{frame['file']}:{frame['line']} {frame['function']}" for frame in mine), waits


def read_spied(text: str) -> tuple[str, ...]:
    """The same from what py-spy printed; none where it was not allowed to look."""
    threads = [
        tuple(line.strip() for line in part.splitlines() if line.startswith("    ")) for part in text.split("\nThread ")
    ]
    return max(threads, key=lambda frames: (any(frame.startswith(f"{ENTRY} ") for frame in frames), len(frames)))


def group(looks: Sequence[Look]) -> list[list[Look]]:
    """Ranks of the same state and innermost frames, whatever the lines; the largest group first."""
    groups: dict[tuple, list[Look]] = {}
    for look in sorted(looks, key=lambda look: look.rank):
        top = tuple(re.sub(r":[\d?]+ ", " ", frame) for frame in look.stack[:TOP_FRAMES])
        groups.setdefault((look.state, top), []).append(look)
    return sorted(groups.values(), key=len, reverse=True)


def odd_ones(looks: Sequence[Look], complete: bool = True) -> tuple[list[int], str]:
    """The ranks that hold the others up, and how that is known.

    Args:
        looks: of every rank whose monitor answered; not empty. complete: whether all have.

    Returns:
        ranks in order: those that are stopped or silent; or else that do not wait while others wait for them; or are
        a step behind; or are elsewhere than most. All, where nothing tells them apart; none, where all wait and it may
        be for a rank that nothing is known of.
    """
    everyone = sorted(look.rank for look in looks)
    steps = [look.step or 0 for look in looks]
    groups = group(looks)
    rules = (
        ([look.rank for look in looks if look.state != "running"], "it does not answer"),
        ([look.rank for look in looks if not look.waits], "the other ranks wait for it"),
        ([look.rank for look, step in zip(looks, steps, strict=True) if step == min(steps)], "it is a step behind"),
        (
            [look.rank for one in groups[1:] for look in one] if len(groups[0]) * 2 > len(looks) else [],
            "it is elsewhere than the other ranks",
        ),
    )
    if rules[0][0]:
        return sorted(rules[0][0]), rules[0][1]
    if not complete and all(look.waits for look in looks):
        return [], "all ranks that are known wait"
    for ranks, why in rules[1:]:
        if 0 < len(ranks) < len(everyone):
            return sorted(ranks), why
    return everyone, "nothing tells the ranks apart"


def describe(looks: Sequence[Look]) -> str:
    """The groups, for people: ranks, where they are, and their innermost frames."""
    lines = []
    for one in group(looks):
        first = one[0]
        ranks = ", ".join(str(look.rank) for look in one)
        doing = first.state if first.state != "running" else "waits for other ranks" if first.waits else "running"
        lines.append(f"rank {ranks}: {doing}, section {first.section}, step {first.step or 0}, {first.seconds:.1f} s")
        lines += [f"    {frame}" for frame in first.stack[: 2 * TOP_FRAMES]]
    return "\n".join(lines)
