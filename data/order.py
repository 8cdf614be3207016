"""Permutations that depend on nothing but their arguments: not on numpy's generators, their version, or the machine.

A permutation of n items sorts them by a 64-bit hash: SplitMix64's finaliser, a bijection of 64-bit integers, applied to
key + (i + 1) * golden. Distinct items have distinct hashes, so there are no ties and any sorting method agrees.
Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
"""

from __future__ import annotations

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def derive_key(*parts: str | int) -> int:
    """A 64-bit key from words and numbers; any change gives an unrelated key."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "little")


def hash_numbers(numbers: np.ndarray, key: int) -> np.ndarray:
    """64-bit hashes (n,) uint64 of integers (n,); distinct for distinct integers below 2**64."""
    with np.errstate(over="ignore"):
        mixed = (numbers.astype(np.uint64) + np.uint64(1)) * _GOLDEN + np.uint64(key)
        mixed ^= mixed >> np.uint64(30)
        mixed *= _MIX_1
        mixed ^= mixed >> np.uint64(27)
        mixed *= _MIX_2
        mixed ^= mixed >> np.uint64(31)
    return mixed


def permutation(n: int, key: int) -> np.ndarray:
    """The permutation of range(n) that belongs to a key, (n,) int64."""
    return np.argsort(hash_numbers(np.arange(n, dtype=np.uint64), key))
