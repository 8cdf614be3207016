"""Which documents are held out for evaluation: a small choice by the hash of their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

AT_LEAST = 3


@dataclass(frozen=True)
class HeldoutChoice:
    """The names of the documents held out whole, or one document whose end is held out.

    Attributes:
        names: documents held out whole.
        tail: name of a document of which only the end is held out; empty for none.
        tail_bytes: how much of its end, before moving the cut to a line's start.
    """

    names: frozenset[str] = frozenset()
    tail: str = ""
    tail_bytes: int = 0


def choose_heldout(sizes: Sequence[tuple[str, int]], share: float, limit_bytes: int) -> HeldoutChoice:
    """Chooses about `share` of the documents, never more than `limit_bytes` of text nor half of the text.

    Documents are taken by rising hash of their name, so that adding documents to a corpus moves few of them between
    the splits; those too large for what is left of the limit stay in training. Where nothing fits (one large
    document, say), the end of the largest document is held out instead.

    Args:
        sizes: (name, bytes) of every document.
        share: fraction of the documents, 0 for none; at least 3 documents are taken where so many fit.
        limit_bytes: most bytes of raw text.
    """
    if share <= 0 or not sizes:
        return HeldoutChoice()
    total = sum(size for _, size in sizes)
    limit = min(limit_bytes, total // 2)
    ranked = sorted((blake2b(name.encode("utf-8"), digest_size=8).digest(), name, size) for name, size in sizes)
    wanted = max(AT_LEAST, round(share * len(sizes)))
    chosen: list[str] = []
    taken = 0
    for _, name, size in ranked:
        if len(chosen) == wanted or (len(chosen) >= AT_LEAST and taken > 0.9 * limit):
            break
        if taken + size <= limit:
            chosen.append(name)
            taken += size
    if chosen:
        return HeldoutChoice(names=frozenset(chosen))
    name, size = max(sizes, key=lambda entry: (entry[1], entry[0]))
    tail = min(limit_bytes, max(1, round(share * size)))
    return HeldoutChoice(tail=name, tail_bytes=tail) if size >= 2 else HeldoutChoice()


def split_tail(data: bytes, tail_bytes: int) -> tuple[bytes, bytes]:
    """Cuts a document in front of its last `tail_bytes` bytes, at a line's start where one follows, never inside a
    UTF-8 character. Both parts are non-empty for documents of at least two characters; one character stays whole
    in the second part."""
    cut = max(1, len(data) - tail_bytes)
    line = data.find(b"\n", cut - 1, len(data) - 1)
    if line >= 0:
        cut = line + 1
    while cut < len(data) and data[cut] & 0xC0 == 0x80:
        cut += 1
    if cut == len(data):  # only one character follows: hold that out
        cut -= 1
        while cut > 0 and data[cut] & 0xC0 == 0x80:
            cut -= 1
    return data[:cut], data[cut:]
