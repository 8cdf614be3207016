"""After a skipped step: which rank, layer, expert, samples and documents it was; all ranks put together what they know.

Two witnesses. `GradientWatch` saw each rank's gradients before they were added up. And the step's forward is done once
more, without gradient, on weights that have not changed: its first tensor that is not finite, and each sequence's loss.
That costs a forward pass for a skipped step, and nothing for any other.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from data.errors import DataError
from data.stream import MicroBatch, Stream
from launch.guard import Verdict
from launch.session import Session
from model.probe import NonFiniteError, attach, layer_and_part
from model.slots import local_experts

MAX_NAMED = 32  # samples, and documents, in one event
MAX_WORST = 4  # sequences of the highest loss


def report_skip(
    session: Session, step: int, verdict: Verdict, figures: dict[str, float], batches: Sequence[MicroBatch]
) -> None:
    """Writes the event of a skipped step; collective, after the engine has skipped.

    Args:
        step: 0-based. figures: loss and gradient norm. batches: this rank's micro-batches of the step.
    """
    seen = _look(session, batches)
    by_rank = session.ranks.dp.gather(seen)
    told: dict[str, Any] = {"step": step + 1, "skip": verdict.kind, **figures}
    if verdict.kind == "non_finite":
        found = _culprit(by_rank)
        told |= found
        samples = list(found.get("samples", [])) or _all_samples(by_rank)
    else:
        worst = sorted((one for rank in by_rank for one in rank["losses"]), key=lambda one: -(one[1] or math.inf))
        told["highest_losses"] = {str(sample): loss for sample, loss in worst[:MAX_WORST]}
        samples = [sample for sample, _ in worst]
    told["n_samples"] = len(samples)
    told["samples"] = samples[:MAX_NAMED]
    told |= _documents(session, told["samples"])
    session.telemetry.event("skip", cause=_cause(verdict, told), **told)


def _look(session: Session, batches: Sequence[MicroBatch]) -> dict[str, Any]:
    """What this rank has to say: JSON."""
    first: list[dict[str, Any]] = []
    losses: list[tuple[int, float | None]] = []
    checks = 0

    def note(error: NonFiniteError) -> None:
        if not first:
            first.append({"order": checks, "layer": error.layer, "tensor": error.tensor, "expert": error.expert})

    def count() -> None:
        nonlocal checks
        checks += 1

    probes = attach(session.model, found=note, checked=count)
    try:
        with torch.no_grad():
            for number, batch in enumerate(batches):
                batch = batch.to(session.device)
                output = session.engine.forward(
                    tokens=batch.tokens, doc_ids=batch.doc_ids, targets=batch.targets, real=batch.real
                )
                assert output.token_losses is not None
                mean = (output.token_losses * batch.loss_mask).sum(1) / batch.loss_mask.sum(1).clamp_min(1)
                finite = [loss if math.isfinite(loss) else None for loss in mean.tolist()]
                losses += list(zip(batch.sequence_ids.tolist(), finite, strict=True))
                if first and "micro_step" not in first[0]:
                    first[0] |= {"micro_step": number, "samples": batch.sequence_ids.tolist()}
    finally:
        probes.remove()
    session.ranks.ep.traffic.reset()
    gradient = session.watch.first()
    found: dict[str, Any] | None = None
    if gradient is not None:
        layer, part = layer_and_part(gradient.parameter)
        expert = local_experts(session.model)[gradient.parameter][gradient.slot] if gradient.slot is not None else None
        samples = batches[gradient.micro_step].sequence_ids.tolist()
        found = {
            "micro_step": gradient.micro_step, "order": gradient.order, "layer": layer, "tensor": f"gradient of {part}",
            "parameter": gradient.parameter, "expert": expert, "samples": samples,
        }  # fmt: skip
    return {"forward": first[0] if first else None, "gradient": found, "losses": losses}


def _culprit(by_rank: list[dict[str, Any]]) -> dict[str, Any]:
    """The first of what the ranks saw: forward before gradient, then by micro-step, place in the pass, and rank."""
    for witness in ("forward", "gradient"):
        seen = [(one[witness]["micro_step"], one[witness]["order"], rank) for rank, one in enumerate(by_rank)
                if one[witness] is not None]  # fmt: skip
        if seen:
            micro_step, _, rank = min(seen)
            found = {key: value for key, value in by_rank[rank][witness].items() if key != "order"}
            return {"rank": rank, "ranks_affected": sorted(rank for *_, rank in seen), **found,
                    "micro_step": micro_step + 1}  # fmt: skip
    return {}


def _all_samples(by_rank: list[dict[str, Any]]) -> list[int]:
    return [sample for rank in by_rank for sample, _ in rank["losses"]]


def _documents(session: Session, samples: list[int]) -> dict[str, Any]:
    """Shards and documents of the samples, on rank 0; a dataset that cannot tell must not end the run."""
    if not session.telemetry.main or not isinstance(session.stream, Stream):
        return {}
    try:
        found, total = session.stream.origins(samples, MAX_NAMED)
    except DataError as error:
        return {"documents": [], "documents_unknown": str(error)}
    named = [{key: value for key, value in origin._asdict().items() if value != ""} for origin in found]
    return {"n_documents": total, "documents": named}


def _cause(verdict: Verdict, told: dict[str, Any]) -> str:
    """One sentence for people."""
    if verdict.kind == "spike":
        return verdict.reason
    if "rank" not in told:
        return f"{verdict.reason}, though each rank's own gradients were finite: it arose where they were added up"
    expert = "" if told["expert"] is None else f", expert {told['expert']}"
    return f"{verdict.reason}: first on rank {told['rank']} in {told['layer']}: {told['tensor']}{expert}"
