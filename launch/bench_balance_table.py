"""From the results of single trainings to rows with spread over seeds, a table, and what the figures say."""

from collections.abc import Sequence
from typing import Any

from launch.bench_balance_arms import DENSE, EP_SIZE, RULES, TOP2, WEAK
from launch.bench_record import Spread

FIGURES = (
    "heldout_loss", "bits_per_byte", "heldout_max_vio", "heldout_floor", "heldout_document_floor", "heldout_rank_vio",
    "step_max_vio", "step_floor", "step_rank_vio", "gate_entropy", "tokens_per_second",
)  # fmt: skip
FACTS = ("setting", "parameters", "active_parameters", "heldout_tokens", "heldout_documents")
HELDOUT_AIM = 0.05  # above the noise floor
_COLUMNS = (  # title, figure, its noise floor, format
    ("loss", "heldout_loss", None, ".3f"),
    ("bits/byte", "bits_per_byte", None, ".3f"),
    ("held-out max_vio", "heldout_max_vio", "heldout_floor", ".3f"),
    ("held-out ranks", "heldout_rank_vio", None, ".3f"),
    ("step max_vio", "step_max_vio", "step_floor", ".3f"),
    ("step ranks", "step_rank_vio", None, ".3f"),
    ("gate entropy", "gate_entropy", None, ".3f"),
    ("tokens/s", "tokens_per_second", None, ",.0f"),
)
_WIDTH = 17


def aggregate(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row an arm, in the order of first appearance: facts, `seeds`, and a Spread of every figure over the seeds.

    A figure that no training of an arm has (balance of a dense model) is None.

    Raises:
        ValueError: two results of one arm and seed, or of one arm under different settings.
    """
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        by_arm.setdefault(result["arm"], []).append(result)
    rows = []
    for arm, found in by_arm.items():
        seeds = [result["seed"] for result in found]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{arm}: two results of one seed among {seeds}")
        row: dict[str, Any] = {"arm": arm, "seeds": len(seeds)}
        for key in FACTS:
            if len({result[key] for result in found}) > 1:
                raise ValueError(f"{arm}: {key} differs between seeds: {[result[key] for result in found]}")
            row[key] = found[0][key]
        for key in FIGURES:
            values = [result[key] for result in found if result[key] is not None]
            row[key] = Spread.of(values) if values else None
        rows.append(row)
    return rows


def render(rows: Sequence[dict[str, Any]]) -> str:
    """The table: medians over the seeds, noise floors in brackets; the least and the greatest below."""
    indent = max(14, *(len(row["arm"]) + 2 for row in rows))
    lines = [" " * indent + "".join(f"{title:>{_WIDTH}}" for title, *_ in _COLUMNS)]
    for row in rows:
        middles, spreads = [], []
        for _, key, floor, pattern in _COLUMNS:
            figure = row[key]
            if figure is None:
                middles.append("-")
                spreads.append("")
                continue
            beside = f" ({row[floor].median:.3f})" if floor else ""
            middles.append(f"{figure.median:{pattern}}{beside}")
            many = figure.repeats > 1
            spreads.append(f"{figure.least:{pattern}} to {figure.greatest:{pattern}}" if many else "")
        lines.append(f"{row['arm']:<{indent}}" + "".join(f"{text:>{_WIDTH}}" for text in middles))
        if any(spreads):
            lines.append(" " * indent + "".join(f"{text:>{_WIDTH}}" for text in spreads))
    return "\n".join([*lines, *_notes(rows), *_settings(rows)])


def _notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    sparse = [row for row in rows if row["heldout_floor"] is not None]
    if not sparse:
        return []
    floors = [row["heldout_document_floor"].median for row in sparse]
    return [
        "in brackets: noise floor of independent tokens. Tokens of one document are not: a router that is fair in the "
        f"long run has {min(floors):.3f} to {max(floors):.3f} over these {sparse[0]['heldout_documents']} documents",
        f"ranks: max_vio over {EP_SIZE} expert-parallel ranks; step: median of the last fifth of the steps",
        "gate entropy: nats a token over the last fifth; ln E for a router that does not tell experts apart",
        "tokens/s: of training, per second of processor time of its one thread, which other programs do not change",
    ]


def _settings(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"  {row['arm']:<16}{row['setting']}; {row['active_parameters']:,} of {row['parameters']:,} parameters active"
        for row in rows
    ]


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the literature leads one to expect, beside what was found, as sentences."""
    by_arm = {row["arm"]: row for row in rows}
    rules = [by_arm[rule] for rule in RULES if rule in by_arm]
    found = []
    if rules:
        best = min(rules, key=lambda row: row["heldout_max_vio"].median)
        above = best["heldout_max_vio"].median - best["heldout_floor"].median
        found.append(
            f"{best['arm']} is the most even: its max_vio over the held-out set is {above:.3f} above the noise floor "
            f"(aim {HELDOUT_AIM}: {'reached' if above <= HELDOUT_AIM else 'NOT reached'})"
        )
    for loss_rule in ("aux_loss", WEAK):
        beside = by_arm.get(loss_rule)
        if beside is None:
            continue
        for row in rules:
            if row["arm"] not in ("aux_loss", "none"):
                share = row["heldout_max_vio"].median / beside["heldout_max_vio"].median
                more = row["heldout_loss"].median - beside["heldout_loss"].median
                found.append(
                    f"{row['arm']}: {share:.2f} times the held-out max_vio of {loss_rule} at {more:+.4f} nats a token"
                )
    for other in (DENSE, TOP2):
        if other in by_arm and rules:
            same = next((row for row in rules if by_arm[other]["setting"].startswith(f"{row['arm']},")), rules[0])
            more = by_arm[other]["heldout_loss"].median - same["heldout_loss"].median
            found.append(
                f"{other} ({by_arm[other]['active_parameters']:,} active parameters): {more:+.4f} nats a token beside "
                f"{same['arm']} ({same['active_parameters']:,})"
            )
    return found
