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
_CHUNK = 1 << 14  # numbers taken together: what fits in a core's own cache


def derive_key(*parts: str | int) -> int:
    """A 64-bit key from words and numbers; any change gives an unrelated key."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "little")


def hash_numbers(numbers: np.ndarray, key: int) -> np.ndarray:
    """64-bit hashes (n,) uint64 of integers (n,); distinct for distinct integers below 2**64."""
    mixed = numbers.astype(np.uint64)
    with np.errstate(over="ignore"):
        mixed += np.uint64(1)
        mixed *= _GOLDEN
        mixed += np.uint64(key)
        mixed ^= mixed >> np.uint64(30)
        mixed *= _MIX_1
        mixed ^= mixed >> np.uint64(27)
        mixed *= _MIX_2
        mixed ^= mixed >> np.uint64(31)
    return mixed


def permutation(n: int, key: int, classes: np.ndarray | None = None, n_classes: int = 1) -> np.ndarray:
    """The permutation of range(n) that belongs to a key, (n,) int64; with classes, class by class.

    Sorting numbers is several times faster than sorting their places, so what is sorted is one number of the class, the
    hash's first bits and the place. The few neighbours that those bits do not tell apart are then sorted by the whole
    hash.

    Args:
        n, key: which permutation.
        classes: (n,) integers from 0 to n_classes - 1: all of class 0 come first, and so on.
    """
    place_bits = max(1, (n - 1).bit_length())
    class_bits = (n_classes - 1).bit_length()
    place_mask = np.uint64((1 << place_bits) - 1)
    mixed = np.empty(n, np.uint64)
    for start in range(0, n, _CHUNK):
        places = np.arange(start, min(start + _CHUNK, n), dtype=np.uint64)
        hashes = hash_numbers(places, key)
        hashes >>= np.uint64(class_bits)
        if classes is not None and class_bits:
            hashes |= classes[start : start + _CHUNK].astype(np.uint64) << np.uint64(64 - class_bits)
        hashes &= ~place_mask
        np.bitwise_or(hashes, places, out=mixed[start : start + _CHUNK])
    mixed.sort()
    alike = np.zeros(n, bool)
    for start in range(0, n - 1, _CHUNK):
        both = mixed[start : start + _CHUNK + 1]
        same = (both[1:] ^ both[:-1]) <= place_mask
        alike[start : start + len(same)] |= same
        alike[start + 1 : start + 1 + len(same)] |= same
        both[:-1] &= place_mask
    mixed[-1:] &= place_mask
    places = mixed.view(np.int64)
    if alike.any():
        found = places[alike]
        hashes = hash_numbers(found, key)
        places[alike] = found[np.argsort(hashes) if classes is None else np.lexsort((hashes, classes[found]))]
    return places
