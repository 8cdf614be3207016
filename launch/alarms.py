"""Alarms; and those on the balance of the experts, judged from counts that all ranks share: all raise the same.

An alarm is raised once its condition has held long enough, and again only after the condition has ended; the end is
told as well. Nothing here acts: the train loop does what the configuration says, see ``actions``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from launch.balance_stats import as_array, max_vio_per_layer
from parallel.config import Action, BalanceConfig

# M MoE layers, E routed experts, G ep_size

Kind = Literal[
    "max_vio", "dead_expert", "rank_vio",
    "save_failed", "loss_drift", "norm_drift", "loss_drop", "router_growth", "logit_growth",
]  # fmt: skip
WHOLE_RUN = "the run"  # in place of a layer's name


@dataclass(frozen=True)
class Alarm:
    """One alarm, or the end of one.

    kind: max_vio (the busiest expert of a layer), dead_expert (no token), rank_vio (the busiest rank of a layer);
        of the whole run: save_failed (launch/saves.py), loss_drift, norm_drift, loss_drop; and router_growth,
        logit_growth (guard.py).
    step: completed optimizer steps when it was raised or ended. since: the first step at which the condition held.
    layer: the layer's name. expert, rank: which one; the busiest of this step, or the dead one; the other is None.
    value: this step's max_vio, over experts or ranks; for a dead expert the steps that it went without a token.
    limit: what the value was measured against. action: what is to be done beside the event; `log` is nothing.
    ended: whether this tells the end; its action is `log`.
    """

    kind: Kind
    step: int
    since: int
    layer: str
    expert: int | None
    rank: int | None
    value: float
    limit: float
    action: Action
    ended: bool
    cause: str

    def fields(self) -> dict[str, Any]:
        """What the event of kind `alarm` holds, `cause` for people among it."""
        place = {"expert": self.expert} if self.rank is None else {"rank": self.rank}
        return {
            "cause": self.cause, "step": self.step, "alarm": self.kind, "layer": self.layer, **place,
            "value": round(self.value, 6), "limit": self.limit, "action": self.action, "since": self.since,
            "ended": self.ended,
        }  # fmt: skip


def actions(alarms: Sequence[Alarm]) -> set[Action]:
    """What the alarms of one step ask for together, each once; empty where there is nothing to do but log."""
    return {alarm.action for alarm in alarms if alarm.action != "log"}


class Watch:
    """One condition at many places at once: for how many steps in a row it has held at each, and which were told.

    Args:
        shape: of the places, (M,) or (M, E).
        patience: steps in a row after which a place is told of.
    """

    def __init__(self, shape: tuple[int, ...], patience: int) -> None:
        self.patience = patience
        self.held = np.zeros(shape, dtype=np.int64)  # steps in a row
        self.since = np.zeros(shape, dtype=np.int64)  # the first of them
        self.told = np.zeros(shape, dtype=bool)

    def update(self, step: int, holds: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Takes one step's conditions; places that are not ``known`` stay as they are.

        Returns:
            places raised and places ended, (n, dimensions) each in ascending order, and for how many steps the
            condition had held before this step, of the whole shape.
        """
        before = self.held.copy()
        self.since[known & holds & (self.held == 0)] = step
        self.held[known & holds] += 1
        self.held[known & ~holds] = 0
        raised = (self.held >= self.patience) & ~self.told
        ended = self.told & (self.held == 0)
        self.told = (self.told | raised) & ~ended
        return np.argwhere(raised), np.argwhere(ended), before

    def state(self) -> list[list[int]]:
        """For each place where the condition holds: its indices, steps in a row, the first of them, told (0 or 1)."""
        return [
            [*place, int(self.held[tuple(place)]), int(self.since[tuple(place)]), int(self.told[tuple(place)])]
            for place in np.argwhere(self.held > 0).tolist()
        ]

    def load_state(self, state: Sequence[Sequence[int]]) -> None:
        """Takes back what ``state`` gave. Raises: ValueError for a place that does not exist here."""
        for array in (self.held, self.since, self.told):
            array[...] = 0
        for *place, held, since, told in state:
            inside = len(place) == self.held.ndim and all(
                0 <= at < size for at, size in zip(place, self.held.shape, strict=True)
            )
            if not inside:
                raise ValueError(
                    f"saved alarms speak of layer and expert {place}, but there are {list(self.held.shape)}; they "
                    "belong to a model of another size: resume with the model that was saved"
                )
            self.held[tuple(place)], self.since[tuple(place)], self.told[tuple(place)] = held, since, told


class Alarms:
    """Judges each completed step's loads against the limits of ``balance.alarm_*``.

    Args:
        config: the limits, the patience and the actions.
        layer_names: M names, as ``balance_stats.layer_names`` gives them.
        n_experts: E.
    """

    def __init__(self, config: BalanceConfig, layer_names: Sequence[str], n_experts: int) -> None:
        self.config = config
        self.layer_names = list(layer_names)
        n_layers = len(self.layer_names)
        self._watches: dict[Kind, Watch] = {}  # of the alarms that are on
        if config.alarm_max_vio > 0:
            self._watches["max_vio"] = Watch((n_layers,), config.alarm_patience_steps)
        if config.alarm_dead_steps > 0:
            self._watches["dead_expert"] = Watch((n_layers, n_experts), config.alarm_dead_steps)
        if config.alarm_rank_vio > 0:
            self._watches["rank_vio"] = Watch((n_layers,), config.alarm_patience_steps)

    def judge(self, step: int, counts: Any, rank_loads: Any) -> list[Alarm]:
        """Judges one completed step. Do not call it for a skipped step, which neither goes on with a row nor ends it.

        A layer that got no token at all in this step says nothing about balance: its conditions stay as they are.

        Args:
            step: completed optimizer steps, this one included (1 after the first), as in events and metrics.
            counts: (M, E) int64, tokens per expert of the global batch, the same on every rank.
            rank_loads: (M, G) int64, tokens per expert-parallel rank, as ``balance_stats.rank_loads`` gives them.

        Returns:
            alarms raised and ended at this step, the same list on every rank.
        """
        counts, loads = as_array(counts), as_array(rank_loads)
        if not counts.size:  # a dense model
            return []
        known = counts.sum(axis=-1) > 0  # (M,)
        found: list[Alarm] = []
        if "max_vio" in self._watches:
            found += self._judge_busiest("max_vio", step, counts, known)
        if "dead_expert" in self._watches:
            found += self._judge_dead(step, counts, known)
        if "rank_vio" in self._watches:
            found += self._judge_busiest("rank_vio", step, loads, known)
        return found

    def state(self) -> dict[str, list[list[int]]]:
        """What a resumed run needs to raise the same alarms at the same steps; JSON."""
        return {kind: watch.state() for kind, watch in self._watches.items()}

    def load_state(self, state: Mapping[str, Sequence[Sequence[int]]]) -> None:
        """Goes on from ``state``. Alarms that were off when it was saved start afresh, those now off are forgotten.

        Raises: ValueError when the state belongs to a model of another size.
        """
        for kind, watch in self._watches.items():
            watch.load_state(state.get(kind, []))

    def _judge_busiest(self, kind: Kind, step: int, loads: np.ndarray, known: np.ndarray) -> list[Alarm]:
        limit, action = self._limit_and_action(kind)
        figures = max_vio_per_layer(loads)  # (M,)
        watch = self._watches[kind]
        raised, ended, before = watch.update(step, np.nan_to_num(figures) > limit, known)
        unit = "rank" if kind == "rank_vio" else "expert"
        name = "max_vio over ranks" if kind == "rank_vio" else "max_vio"
        found = []
        for layer, is_end in [(row[0], False) for row in raised] + [(row[0], True) for row in ended]:
            value, busiest = float(figures[layer]), int(np.argmax(loads[layer]))
            where = self.layer_names[layer]
            if is_end:
                cause = f"ended: {where}: {name} is back at {value:.3g}, after {_steps(before[layer])} above {limit:g}"
            else:
                cause = (
                    f"{where}: {name} has been above {limit:g} for {_steps(watch.held[layer])}, now {value:.3g} with "
                    f"{unit} {busiest} the busiest{self._what_is_done(action)}"
                )
            found.append(
                Alarm(
                    kind, step, int(watch.since[layer]), where,
                    busiest if unit == "expert" else None, busiest if unit == "rank" else None,
                    value, limit, "log" if is_end else action, is_end, cause,
                )
            )  # fmt: skip
        return found

    def _judge_dead(self, step: int, counts: np.ndarray, known: np.ndarray) -> list[Alarm]:
        limit, action = self._limit_and_action("dead_expert")
        watch = self._watches["dead_expert"]
        raised, ended, before = watch.update(step, counts == 0, known[:, None].repeat(counts.shape[1], axis=1))
        found = []
        for (layer, expert), is_end in [(at, False) for at in raised.tolist()] + [(at, True) for at in ended.tolist()]:
            steps = int(before[layer, expert] if is_end else watch.held[layer, expert])
            where = self.layer_names[layer]
            if is_end:
                cause = f"ended: {where}: expert {expert} has a token again, after {_steps(steps)} without"
            else:
                cause = f"{where}: expert {expert} has had no token for {_steps(steps)}{self._what_is_done(action)}"
            since = int(watch.since[layer, expert])
            found.append(
                Alarm("dead_expert", step, since, where, expert, None, steps, limit,
                      "log" if is_end else action, is_end, cause)
            )  # fmt: skip
        return found

    def _limit_and_action(self, kind: Kind) -> tuple[float, Action]:
        config = self.config
        return {
            "max_vio": (config.alarm_max_vio, config.on_max_vio),
            "dead_expert": (config.alarm_dead_steps, config.on_dead_expert),
            "rank_vio": (config.alarm_rank_vio, config.on_rank_vio),
        }[kind]

    def _what_is_done(self, action: Action) -> str:
        factor, steps = self.config.raise_rate_factor, self.config.raise_rate_steps
        return {
            "log": "",
            "raise_rate": f"; the rate is {factor:g} times as high for {_steps(steps)}",
            "save": "; a checkpoint is saved",
            "stop": "; a checkpoint is saved and the run stops",
        }[action]


def _steps(number: int) -> str:
    return "1 step" if number == 1 else f"{number} steps"
