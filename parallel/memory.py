"""Bytes that the routed path of one MoE layer keeps on a rank from its forward to its backward. Pure functions.

Kept are what came to the rank's experts, once for each (token, rank) pair, and the first product of each choice; with
them the whole numbers that say where rows belong. There is no tensor of a token's hidden size for each choice.

    rows that came   R x D            R <= tokens of the group; T on one rank
    first product    N x 2I           N choices of this rank's experts; T x K on one rank
    numbers          8 bytes each     where each choice, record and token is

Source of what need not be kept: SonicMoE, arXiv 2512.14080, section 4.
"""

# T tokens, K top-k, D hidden, I expert width, R rows that came, N choices of local experts, P records sent in one hop

from collections.abc import Sequence

_INDEX = 8  # int64
_WEIGHT = 4  # fp32


def expert_bytes(n_rows: int, n_choices: int, hidden: int, width: int, itemsize: int) -> int:
    """What the experts keep.

    Args:
        n_rows: R. n_choices: N. hidden: D. width: I. itemsize: bytes of a number in the compute dtype.
    """
    products = (n_rows * hidden + n_choices * 2 * width) * itemsize
    return products + n_choices * (2 * _INDEX + _WEIGHT)  # each choice's row, its slot and its weight


def one_rank_bytes(n_tokens: int, top_k: int, hidden: int, width: int, itemsize: int) -> int:
    """What a layer keeps where all experts are on one rank; the tokens are counted, though others may keep them too."""
    return expert_bytes(n_tokens, n_tokens * top_k, hidden, width, itemsize)


def several_ranks_bytes(
    n_tokens: int,
    top_k: int,
    records_sent: Sequence[int],
    n_rows: int,
    n_choices: int,
    hidden: int,
    width: int,
    itemsize: int,
    chunks: int = 1,
) -> int:
    """What a layer keeps on one of several ranks.

    Args:
        records_sent: P at each hop, its own included; of two hops, rows that came by the first are not kept.
        n_rows: R, (token, rank) pairs that came to this rank. n_choices: N.
    """
    numbers = n_tokens * top_k + sum(2 * records for records in records_sent)
    offsets = n_tokens + chunks  # of the first hop; the second's are of the rows that it was given
    if len(records_sent) == 2:
        offsets += records_sent[1] + chunks  # at most: a row that came goes to one rank or more
    return expert_bytes(n_rows, n_choices, hidden, width, itemsize) + _INDEX * (numbers + offsets)


def bounded_bytes(n_tokens: int, top_k: int, hidden: int, itemsize: int) -> int:
    """What a layer keeps where its rows exceeded `parallel.rows_budget`: its tokens, their choices and weights."""
    return n_tokens * (hidden * itemsize + top_k * (_INDEX + _WEIGHT))
