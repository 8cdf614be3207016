"""The noise floor of max_vio for tokens that come in documents: pure functions of integer counts."""

import numpy as np

# D documents, M MoE layers, E routed experts


def document_floor(by_document: np.ndarray, draws: int = 200, seed: int = 0) -> float:
    """The mean max_vio of a router that is exactly fair in the long run, over as many documents as these.

    Tokens of one document prefer the same experts. `balance_stats.noise_floor` takes tokens to be independent and is
    too low for them by about the square root of the tokens that act as one. Here the documents are the units: what
    each sends to an expert beyond its fair part is centred over all documents, so that the totals would be fair, and
    documents are drawn anew with replacement (bootstrap).

    Args:
        by_document: (D, M, E) int64, tokens per expert.
        draws: how often D documents are drawn.

    Returns:
        The mean over draws and layers; NaN without tokens.
    """
    counts = by_document.astype(np.float64)
    totals = counts.sum(axis=0)  # (M, E)
    rows = counts.sum(axis=2)  # (D, M)
    if counts.size == 0 or not totals.sum():
        return float("nan")
    share = totals / totals.sum(axis=1, keepdims=True)
    excess = counts - rows[:, :, None] * share  # (D, M, E); sums to zero over the documents
    draw = np.random.default_rng(seed)
    n_documents, _, n_experts = counts.shape
    found = []
    for _ in range(draws):
        times = np.bincount(draw.integers(0, n_documents, n_documents), minlength=n_documents).astype(np.float64)
        mean = np.einsum("d,dm->m", times, rows) / n_experts  # (M,)
        found.append(np.mean(np.einsum("d,dme->me", times, excess).max(axis=1) / mean))
    return float(np.mean(found))
