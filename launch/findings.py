"""Why a run misbehaved, in words: its balance, from history, alarms and pairs of experts; its slow ranks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch import balance_stats
from launch.history import History, Spell

# L layers, E routed experts, M drawn steps, W last steps

MAX_NAMED = 8  # experts, layers or alarms that one sentence names
MAX_ALARM_ROWS = 40
ALARM_WORDS = {
    "max_vio": "busiest expert", "dead_expert": "expert without a token", "rank_vio": "busiest rank",
    "save_failed": "failed save", "loss_drift": "rising loss", "norm_drift": "rising gradient norm",
    "loss_drop": "sudden drop of the loss", "router_growth": "growing router weights",
    "logit_growth": "growing output layer",
}  # fmt: skip


def findings(
    history: History,
    spells: Sequence[Spell],
    pairs: tuple[int, list[str], np.ndarray] | None,
    summary: dict[str, Any],
    layers: Sequence[str],
    lane_period: int | None = None,
) -> list[str]:
    """Sentences about what stands out in the balance, the most telling first; empty for a dense model.

    Args:
        pairs: what ``history.read_pairs`` gave. summary: what ``history.summarize_history`` gave.
        layers: L names. lane_period: steps after which the same lanes of the data are read again, where that is whole.
    """
    if not len(history.loads):
        return []
    found = [_alarms(spells), _dead(history, layers), _uneven(history, layers), _periodic(history, lane_period),
             _bias(history, layers),
             _climbing(history, layers), _changed(history, layers), _entropy(history, layers),
             _ranks(history, layers), _waiting(summary), _pairs(pairs)]  # fmt: skip
    return [sentence for sentence in found if sentence]


def alarm_table(spells: Sequence[Spell]) -> list[str]:
    """The run's alarms as a Markdown table, the last MAX_ALARM_ROWS of them; empty without any."""
    if not spells:
        return []
    lines = ["| alarm | layer | expert or rank | value | limit | steps | action |", "|---|---|---|---|---|---|---|"]
    for spell in spells[-MAX_ALARM_ROWS:]:
        unit = f"rank {spell.rank}" if spell.rank is not None else f"expert {spell.expert}"
        unit = "-" if spell.rank is None and spell.expert is None else unit
        until = f"to {spell.ended - 1}" if spell.ended is not None else "on, not ended"
        lines.append(
            f"| {ALARM_WORDS.get(spell.alarm, spell.alarm)} | {spell.layer} | {unit} | {spell.value:.3g} | "
            f"{spell.limit:g} | {spell.since} {until}; raised at {spell.raised} | {spell.action} |"
        )
    if len(spells) > MAX_ALARM_ROWS:
        lines += ["", f"The last {MAX_ALARM_ROWS} of {len(spells)}; all are in events.jsonl."]
    return lines


def slow_ranks(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each rank that the events `straggler` name, the latest first: how slow, in what, when, and why."""
    told: dict[int, list[Mapping[str, Any]]] = {}
    for event in events:
        if event["kind"] == "straggler":
            told.setdefault(event["rank"], []).append(event)
    sentences = []
    for rank, spells in reversed(told.items()):
        raised = [event for event in spells if not event["ended"]] or spells
        worst = max(raised, key=lambda event: event["ratio"])
        text = (
            f"**Rank {rank} on {worst['host']} was slow** {_count(len(raised), 'time')}, last from step "
            f"{raised[-1]['step']} {'to ' + str(spells[-1]['step']) if spells[-1]['ended'] else 'on'}: up to "
            f"{worst['ratio']:.2f} times the own time of the middle rank, {1e3 * worst['seconds_more']:,.0f} ms more a "
            f"step, most of it in {worst['phase']}"
        )
        if worst["reason"] == "expert load":
            text += (
                f". It had more work: its experts got {worst['load_ratio']:.2f} times the mean of tokens; "
                "`balance.placement = load` can even that out"
            )
        sentences.append(text + ".")
    return sentences


def _alarms(spells: Sequence[Spell]) -> str:
    if not spells:
        return ""
    on = [spell for spell in spells if spell.ended is None]
    named = [f"{ALARM_WORDS.get(s.alarm, s.alarm)} in {s.layer} since step {s.since}" for s in on]
    still = f"{len(on)} had not ended at the last step ({_listed(named)})" if on else "all have ended"
    return f"{_count(len(spells), 'alarm')} raised; {still}."


def _dead(history: History, layers: Sequence[str]) -> str:
    recent = history.recent_loads  # (W, L, E)
    seen = recent.sum(axis=2, keepdims=True).sum(axis=0) > 0  # (L, 1): layers that got tokens at all
    dead = (recent.sum(axis=0) == 0) & seen  # (L, E)
    named = [
        f"{layers[layer]}: {_listed([str(expert) for expert in np.flatnonzero(row)])}"
        for layer, row in enumerate(dead)
        if row.any()
    ]
    if not named:
        return ""
    return f"**{_count(int(dead.sum()), 'expert')} got no token in the {_last(recent)}**: {_listed(named, '; ')}."


def _uneven(history: History, layers: Sequence[str]) -> str:
    means = _recent_means(history, "max_vio")
    if len(layers) < 2 or np.isnan(means).all():
        return ""
    floor = float(np.nanmean(history.recent_floor))
    worst, best = int(np.nanargmax(means)), int(np.nanargmin(means))
    return (
        f"The least even is {layers[worst]}: max_vio {means[worst]:.2f} in the "
        f"{_last(history.recent_floor)}, {means[worst] / floor:.1f} times the noise "
        f"floor; {layers[best]} is the most even with {means[best]:.2f}."
    )


def _periodic(history: History, lane_period: int | None) -> str:
    """Spikes of max_vio that come back after the same number of steps, in the run's second half."""
    half = len(history.steps) // 2
    vio = history.figures["max_vio"][half:]
    if not np.isfinite(vio).any():
        return ""
    median = float(np.nanmedian(vio))
    spikes = np.nan_to_num(vio) > 2 * median
    period = _period(spikes)
    if period is None:
        return ""
    text = f"max_vio rises to {float(np.nanmax(vio)):.2f} every {period} steps, over a median of {median:.2f}"
    if period == lane_period:
        text += (
            ": after so many steps the same lanes of the data come again (`data.lanes` / `train.global_batch_size`), "
            "and one of them holds a document unlike the others, whose tokens prefer the same experts. "
            "It ends with that document"
        )
    return text + "."


def _period(spikes: np.ndarray) -> int | None:
    """The least number of steps, 2 or more, after which three of four spikes, (n,) bool, come again; None without one,
    or where spikes are so many that they meet by chance."""
    if spikes.sum() < 4 or spikes.mean() > 0.25:
        return None
    for period in range(2, len(spikes) // 4 + 1):
        begun = spikes[:-period].sum()
        if begun >= 3 and (spikes[:-period] & spikes[period:]).sum() >= 0.75 * begun:
            return period
    return None


def _bias(history: History, layers: Sequence[str]) -> str:
    bias = history.bias[-1]  # (L, E)
    if not np.isfinite(bias).all():
        return ""
    spans = bias.max(axis=1) - bias.min(axis=1)
    layer = int(spans.argmax())
    high, low = int(bias[layer].argmax()), int(bias[layer].argmin())
    if spans[layer] <= 1.0:
        return ""
    return (
        f"**The bias is saturated** in {layers[layer]}: it spans {spans[layer]:.2f}, more than two scores between 0 "
        f"and 1 can differ, so that expert {low} can no longer win against expert {high} whatever the token."
    )


def _climbing(history: History, layers: Sequence[str]) -> str:
    bias = history.bias[-max(2, len(history.bias) // 3) :]  # (m, L, E)
    if len(bias) < 10 or not np.isfinite(bias).all():
        return ""
    bias = balance_stats.against_the_median(bias)
    net = bias[-1] - bias[0]  # (L, E)
    way = np.abs(np.diff(bias, axis=0)).sum(axis=0)
    climbing = (np.abs(net) > 0.9 * way) & (way > 0)
    if not climbing.any():
        return ""
    layer, expert = (int(i) for i in np.unravel_index(np.argmax(np.abs(net) * climbing), net.shape))
    first = history.drawn_steps[-len(bias)]
    return (
        f"{_count(int(climbing.sum()), 'bias', 'biases')} moved in one direction alone from step {first} on, most that "
        f"of expert {expert} in {layers[layer]} ({net[layer, expert]:+.3f}): balance is not reached there; a larger "
        "`balance.rate` gets there sooner."
    )


def _changed(history: History, layers: Sequence[str]) -> str:
    means = _recent_means(history, "changed_by_bias_share")
    if np.isnan(means).all():
        return ""
    most = int(np.nanargmax(means))
    text = f"The bias changed {100 * np.nanmean(means):.1f}% of the choices in the last steps"
    text += f", most in {layers[most]} ({100 * means[most]:.1f}%)" if len(layers) > 1 else ""
    return text + ("; there it decides more than the scores do." if means[most] > 0.5 else ".")


def _entropy(history: History, layers: Sequence[str]) -> str:
    means = _recent_means(history, "gate_entropy")
    if np.isnan(means).all():
        return ""
    bound = np.log(history.loads.shape[2])
    lowest, highest = int(np.nanargmin(means)), int(np.nanargmax(means))
    text = f"Gate entropy is {np.nanmean(means):.2f} nats of at most ln E = {bound:.2f} in the last steps"
    text += f", lowest in {layers[lowest]} ({means[lowest]:.2f})" if len(layers) > 1 else ""
    if means[lowest] < 0.3 * bound:
        return f"{text}: there nearly all tokens see the same few experts in front; a collapsed router looks like this."
    if means[highest] > 0.995 * bound:
        return f"{text}; in {layers[highest]} ({means[highest]:.3f}) the scores hardly tell the experts apart."
    return text + "."


def _ranks(history: History, layers: Sequence[str]) -> str:
    ep_size = int(history.last.get("ep_size") or 1)
    recent = history.recent_loads.sum(axis=0)  # (L, E)
    if ep_size < 2 or not recent.sum():
        return ""
    loads = balance_stats.rank_loads(recent, ep_size, history.placement)  # (L, G)
    layer = int(np.nanargmax(balance_stats.max_vio_per_layer(loads)))
    rank = int(loads[layer].argmax())
    ratio = loads[layer, rank] / loads[layer].mean()
    return (
        f"Expert-parallel rank {rank} received {ratio:.2f} times its share of {layers[layer]} over the last steps, the "
        f"most of any rank in any layer{'; `balance.placement = load` can even that out' if ratio > 1.1 else ''}."
    )


def _waiting(summary: dict[str, Any]) -> str:
    share = summary["waiting_share"]
    if share is None:
        return ""
    text = f"Ranks waited for the busiest one during {100 * share:.1f}% of the step time"
    if summary["all_to_all_share"]:
        text += f", of {100 * summary['all_to_all_share']:.1f}% in all-to-all"
    return f"**{text}.**" if share > 0.1 else f"{text}."


def _pairs(pairs: tuple[int, list[str], np.ndarray] | None) -> str:
    if pairs is None:
        return ""
    step, layers, counts = pairs
    lift = balance_stats.coactivation_lift(counts)  # (L, E, E)
    known = np.nan_to_num(lift)  # no pair: 0
    chance = np.divide(counts, known, out=np.full(lift.shape, np.inf), where=known > 0)
    certain = counts - chance > 4 * np.sqrt(chance)  # four standard deviations of a Poisson count
    if not certain.any():
        return ""
    layer, first, second = (int(i) for i in np.unravel_index(np.argmax(known * certain), lift.shape))
    return (
        f"Experts {first} and {second} of {layers[layer]} are chosen together {lift[layer, first, second]:.1f} times "
        f"as often as chance would (step {step}), the most of all pairs."
    )


def _recent_means(history: History, key: str) -> np.ndarray:
    """The last steps' mean of each layer, (L,); NaN where it was not measured."""
    recent = history.recent_layers[key]
    known = np.isfinite(recent)
    return np.divide(np.where(known, recent, 0.0).sum(axis=0), known.sum(axis=0),
                     out=np.full(recent.shape[1], np.nan), where=known.any(axis=0))  # fmt: skip


def _last(recent: np.ndarray) -> str:
    return "last step" if len(recent) == 1 else f"last {len(recent)} steps"


def _listed(names: Sequence[str], between: str = ", ") -> str:
    more = f"{between}and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return between.join(names[:MAX_NAMED]) + more


def _count(number: int, singular: str, plural: str | None = None) -> str:
    return f"{number} {singular if number == 1 else plural or singular + 's'}"
