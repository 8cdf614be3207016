"""The experts' whole feed-forward, gather to weighted rows, as one autograd function that keeps little."""

# T tokens, D hidden, L local experts, I expert width, R rows (grouped by expert, ascending)

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from kernels.backend import Backend, resolve, size_class
from kernels.choice import both_ways
from kernels.experts_reference import ExpertsReference


def experts_mlp(
    rows_source: Tensor,
    token_of_row: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    rows_per_expert: Sequence[int] | Tensor,
    weights: Tensor | None = None,
    *,
    combine: bool = False,
    keep_hidden: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """weights * down(silu(gate(x)) * up(x)) with each row's own expert, x = rows_source[token_of_row].

    Keeps for the backward: its inputs and, where `keep_hidden`, the (R, 2I) result of the first product. No tensor of
    (R, D) is kept: rows are gathered again, and the gradient of a row's weight is <grad @ down, activation>, which
    needs no result of the second product.

    Args:
        rows_source: (T, D) tokens; with token_of_row None, (R, D) rows.
        token_of_row: (R,) int64, the token of each row, rows of expert 0 first, then of expert 1, and so on. A token
            may stand in any number of rows. None where rows_source holds the rows themselves.
        gate_up: (L, 2I, D), gate first; same dtype as rows_source (under autocast all are cast to its dtype).
        down: (L, D, I).
        rows_per_expert: L integers >= 0, their sum at most R: host integers, or a tensor, which the Triton backend
            reads on the device, without waiting for it. Rows past the last expert's are padding.
        weights: (R,) fp32, multiplied onto the result; None for 1.
        combine: add up the rows of each token: (T, D) instead of (R, D), in the order of rows, with sums in fp32.
        keep_hidden: False keeps only the inputs and makes the first product again in the backward: a third of the
            forward's work more for (R, 2I) less.
        backend: `reference` works through pieces that stay near a CPU's cache and runs each expert's products (torch's
            grouped_mm on a GPU, where it can), `triton` our kernels (a GPU, or Triton's interpreter); `auto` takes the
            reference on a CPU, and on a GPU the one that was measured to be faster (kernels/choice.py).

    Returns:
        (R, D), padding rows zero; with `combine` (T, D); in rows_source's dtype.

    Raises:
        ValueError: shapes, dtypes or counts do not fit together, or a forced backend cannot take this input.

    Source: SonicMoE, arXiv 2512.14080, section 4 (what is kept, and the weights' gradient).
    """
    _check(rows_source, token_of_row, gate_up, down, rows_per_expert, weights, combine)
    if torch.is_autocast_enabled(rows_source.device.type):
        dtype = torch.get_autocast_dtype(rows_source.device.type)
        rows_source, gate_up, down = rows_source.to(dtype), gate_up.to(dtype), down.to(dtype)
    if not rows_source.dtype == gate_up.dtype == down.dtype:
        raise ValueError(
            f"experts_mlp: rows are {rows_source.dtype}, gate_up {gate_up.dtype} and down {down.dtype}; cast them alike"
        )

    def run(name: str) -> list[Tensor]:
        return both_ways(
            lambda source, gate_up, down, weights: experts_mlp(
                source, token_of_row, gate_up, down, rows_per_expert, weights, combine=combine,
                keep_hidden=keep_hidden, backend=cast(Backend, name),
            ),
            rows_source, gate_up, down, weights,
        )  # fmt: skip

    n_rows = rows_source.shape[0] if token_of_row is None else token_of_row.shape[0]
    shapes = (size_class(n_rows), *gate_up.shape, token_of_row is None, weights is None, combine)
    if resolve("experts_mlp", backend, rows_source, run, shapes) == "triton":
        from kernels.experts_triton import ExpertsTriton

        function: type[torch.autograd.Function] = ExpertsTriton
        counts = rows_per_expert if isinstance(rows_per_expert, Tensor) else tuple(rows_per_expert)
    else:
        function = ExpertsReference
        counts = tuple(rows_per_expert.tolist() if isinstance(rows_per_expert, Tensor) else rows_per_expert)
    return cast(Tensor, function.apply(rows_source, token_of_row, gate_up, down, weights, counts, combine, keep_hidden))


def _check(
    source: Tensor,
    token_of_row: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    rows_per_expert: Sequence[int] | Tensor,
    weights: Tensor | None,
    combine: bool,
) -> None:
    """Shapes, and counts where they are on the host."""
    if gate_up.dim() != 3 or down.dim() != 3 or gate_up.shape[1] != 2 * down.shape[2]:
        raise ValueError(
            f"experts_mlp: gate_up {tuple(gate_up.shape)} and down {tuple(down.shape)} do not fit; "
            "gate_up must be (L, 2I, D) and down (L, D, I)"
        )
    n_experts, _, hidden = gate_up.shape
    if source.dim() != 2 or source.shape[1] != hidden or down.shape[:2] != (n_experts, hidden):
        raise ValueError(
            f"experts_mlp: rows {tuple(source.shape)}, gate_up {tuple(gate_up.shape)} and down {tuple(down.shape)} do "
            "not fit; they must be (T, D), (L, 2I, D) and (L, D, I)"
        )
    n_rows = source.shape[0] if token_of_row is None else token_of_row.shape[0]
    if token_of_row is None and combine:
        raise ValueError("experts_mlp: combine adds up each token's rows and so needs token_of_row; give it")
    if weights is not None and weights.shape != (n_rows,):
        raise ValueError(f"experts_mlp: weights {tuple(weights.shape)} for {n_rows} rows; give one for each row")
    if len(rows_per_expert) != n_experts:
        raise ValueError(
            f"experts_mlp: {len(rows_per_expert)} row counts for {n_experts} experts; give one count for each"
        )
    if not isinstance(rows_per_expert, Tensor) and (
        min(rows_per_expert, default=0) < 0 or sum(rows_per_expert) > n_rows
    ):
        raise ValueError(
            f"experts_mlp: rows_per_expert {tuple(rows_per_expert)} must be >= 0 and sum to at most the {n_rows} rows"
        )
