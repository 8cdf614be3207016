"""Judges each step from numbers that every rank shares, so that all ranks decide alike.

The loss and the gradient norm are sums over all ranks: one number that is not finite anywhere makes them so
everywhere. They are the flag on which ranks agree, and it costs no exchange of its own.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from launch.alarms import WHOLE_RUN, Alarm, Kind
from launch.drift import Drift, Drop
from launch.guard_config import GuardConfig
from launch.spikes import Window

LEAST_SPIKE = {"loss": 0.2, "gradient norm": 3.0}  # see spikes.Window; the norm of a healthy run triples now and then
LEAST_DRIFT = {"loss": 0.02, "gradient norm": 1.0}  # see drift.Drift
_DRIFTS: dict[str, Kind] = {"loss": "loss_drift", "gradient norm": "norm_drift"}


def ordinal(number: int) -> str:
    """A number as a rank in English: 1st, 2nd, 3rd, 4th, 11th, 21st."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


class TrainingDivergedError(RuntimeError):
    """Too many steps in a row had no finite loss or gradient, or going back did not help."""


@dataclass(frozen=True)
class Verdict:
    """What is to be done with a step.

    keep: apply it. kind: why not. reason: the same for people.
    then: go on; stop the run; or go back to an older checkpoint.
    first: 0-based, the first of the steps in a row that were skipped, this one included.
    alarms: raised and ended by this step.
    """

    keep: bool
    kind: Literal["", "non_finite", "spike"] = ""
    reason: str = ""
    then: Literal["go on", "stop", "go back"] = "go on"
    first: int = 0
    alarms: tuple[Alarm, ...] = ()


class Guard:
    """Skips steps that are not finite or stand out; stops or goes back when that does not end; watches for drift.

    Args:
        config: the `guard` section.
    """

    def __init__(self, config: GuardConfig | None = None) -> None:
        self.config = config or GuardConfig()
        size = self.config.spike_window
        self._windows = {name: Window(size, self.config.spike_sigmas, least) for name, least in LEAST_SPIKE.items()}
        self._drifts = {name: Drift(self.config.drift_window, least) for name, least in LEAST_DRIFT.items()}
        self._since: dict[str, int] = dict.fromkeys([*_DRIFTS.values(), "loss_drop"], 0)
        self._drop = Drop()
        self._row = {"non_finite": 0, "spike": 0}  # skipped steps in a row, by kind
        self._first = 0  # of all skipped steps in a row
        self.rollbacks = 0  # of the whole run: going back does not take it back
        self._weights: dict[str, float] = {}  # sizes at the first look
        self._grown: dict[str, int] = {}  # of which an alarm was raised -> at which step

    def afresh(self) -> None:
        """Compares with nothing that came before: the data's mix, its order or the rate are others from here on.

        No spike, drift or drop is judged until there are enough new steps; what is not finite still is. The row of such
        steps goes on.
        """
        for window in self._windows.values():
            window.clear()
        for drift in self._drifts.values():
            drift.begin()
        self._row["spike"] = 0

    def judge(self, step: int, loss: float, grad_norm: float) -> Verdict:
        """Judges one step.

        Args:
            step: number of the step, 0-based. loss, grad_norm: global figures, equal on every rank.
        """
        figures = {"loss": loss, "gradient norm": grad_norm}
        wrong = [f"{name} is {value}" for name, value in figures.items() if not math.isfinite(value)]
        if wrong:
            return self._skip(step, "non_finite", " and ".join(wrong))
        bounds = {name: window.bounds() for name, window in self._windows.items()} if self.config.spike_window else {}
        high = [
            f"{name} {figures[name]:.4g} is above {bound[1]:.4g}"
            for name, bound in bounds.items()
            if bound is not None and figures[name] > bound[1]
        ]
        if high and self._row["spike"] < self.config.max_spikes:
            return self._skip(step, "spike", " and ".join(high))
        reason = ""
        if high:
            reason = f"{' and '.join(high)} after {self._row['spike']} skipped steps: taken as the new level"
            for window in self._windows.values():
                window.clear()
            bounds = {}
        self._row = dict.fromkeys(self._row, 0)
        for name, window in self._windows.items():
            window.add(figures[name])
        return Verdict(True, reason=reason, alarms=tuple(self._watch(step + 1, figures, bounds.get("loss"))))

    def _skip(self, step: int, kind: Literal["non_finite", "spike"], reason: str) -> Verdict:
        if not any(self._row.values()):
            self._first = step
        self._row[kind] += 1
        spent = self._row["non_finite"] >= self.config.max_skips
        if self.config.rollback_steps and (spent or self._row["spike"] >= self.config.max_spikes):
            back = self.rollbacks < self.config.max_rollbacks
            return Verdict(False, kind, reason, "go back" if back else "stop", self._first)
        return Verdict(False, kind, reason, "stop" if spent else "go on", self._first)

    def lost(self, step: int, verdict: Verdict) -> TrainingDivergedError:
        """The error to raise on every rank after a verdict that stops the run. step: 0-based."""
        count = sum(self._row.values())
        went_back = f", after going back {self.rollbacks} times" if self.rollbacks else ""
        return TrainingDivergedError(
            f"step {step + 1}: {verdict.reason}, for the {ordinal(count)} step in a row{went_back}; go back to an "
            "earlier checkpoint with a lower optimizer.lr, or find the first with train.finite_checks=true"
        )

    def went_back(self) -> None:
        """Counts one return to an older checkpoint, whose state has been taken back."""
        self.rollbacks += 1
        self._row = dict.fromkeys(self._row, 0)

    def _watch(self, step: int, figures: Mapping[str, float], bounds: tuple[float, float] | None) -> list[Alarm]:
        """Slow changes, after `step` steps."""
        found = []
        for name, drift in self._drifts.items() if self.config.drift_window else ():
            ratio, kind = drift.add(figures[name]), _DRIFTS[name]
            if ratio is None:
                continue
            limit, blocks = 1 + LEAST_DRIFT[name], f"medians of {self.config.drift_window} steps"
            if drift.on:
                self._since[kind] = step - 3 * self.config.drift_window
                cause = f"the {name} creeps up: {ratio:.3g} times what it was, by {blocks}, each above the one before"
            else:
                cause = f"ended: the {name} no longer rises, by {blocks}"
            since = self._since[kind]
            found.append(Alarm(kind, step, since, WHOLE_RUN, None, None, ratio, limit, "log", not drift.on, cause))
        change = self._drop.add(figures["loss"], bounds[0] if bounds else None)
        if change is not None:
            floor = bounds[0] if bounds else 0.0
            if change:
                self._since["loss_drop"] = step - self._drop.below + 1
                cause = (
                    f"the loss dropped below {floor:.4g} at once and has stayed there for {self._drop.below} steps; "
                    "look at the data: repeated or leaking text looks like this"
                )
            else:
                cause = "ended: the loss is in its ordinary range again, or that has followed it"
            since, loss = self._since["loss_drop"], figures["loss"]
            found.append(Alarm("loss_drop", step, since, WHOLE_RUN, None, None, loss, floor, "log", not change, cause))
        return found

    def judge_weights(self, step: int, sizes: Mapping[str, float]) -> list[Alarm]:
        """Compares the sizes of weights with those at the first look.

        Args:
            step: steps done. sizes: root mean squares by name, the same on every rank.
        """
        found = []
        for name, size in sizes.items() if self.config.weight_growth else ():
            start = self._weights.setdefault(name, size)
            ratio = size / start if start > 0 else 1.0
            grown = ratio > self.config.weight_growth
            if grown == (name in self._grown):
                continue
            if grown:
                self._grown[name] = step
            since = self._grown[name] if grown else self._grown.pop(name)
            kind: Kind = "logit_growth" if name == "output layer" else "router_growth"
            cause = f"{'' if grown else 'ended: '}the weights of the {name} are {ratio:.3g} times as large as at first"
            found.append(
                Alarm(kind, step, since, name, None, None, ratio, self.config.weight_growth, "log", not grown, cause)
            )
        return found

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to judge as this one would; JSON."""
        return {
            "windows": {name: window.state() for name, window in self._windows.items()},
            "drifts": {name: drift.state() for name, drift in self._drifts.items()},
            "since": dict(self._since), "below": self._drop.below, "row": dict(self._row), "first": self._first,
            "rollbacks": self.rollbacks, "weights": dict(self._weights), "grown": dict(self._grown),
        }  # fmt: skip

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state` gave; an older checkpoint's empty state starts afresh."""
        for name, window in self._windows.items():
            window.load_state(state.get("windows", {}).get(name, ()))
        for name, drift in self._drifts.items():
            drift.load_state(state.get("drifts", {}).get(name, {}))
        self._since |= state.get("since", {})
        self._drop.below = int(state.get("below", 0))
        self._row = {kind: int(state.get("row", {}).get(kind, 0)) for kind in self._row}
        self._first = int(state.get("first", 0))
        self.rollbacks = int(state.get("rollbacks", 0))
        self._weights = dict(state.get("weights", {}))
        self._grown = dict(state.get("grown", {}))
