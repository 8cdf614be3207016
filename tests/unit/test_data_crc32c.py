"""CRC-32C against published vectors and a bit-by-bit reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import crc32c as module

WAYS = [module.in_numpy]
if module._compiled():
    WAYS.append(module.crc32c)


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__, scope="module")
def crc32c(request: pytest.FixtureRequest):
    """Both ways: numpy, and the compiled package where it is installed."""
    return request.param


def bit_by_bit(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "expected"),
    [  # RFC 3720, appendix B.4, and the usual check value
        (b"123456789", 0xE3069283),
        (b"", 0),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_published_vectors(crc32c, data: bytes, expected: int) -> None:
    assert crc32c(data) == expected


@settings(max_examples=60, deadline=None)
@given(length=st.integers(0, 2000), cut=st.integers(0, 2000), seed=st.integers(0, 2**32 - 1))
def test_equals_bit_by_bit_and_goes_on(crc32c, length: int, cut: int, seed: int) -> None:
    data = np.random.default_rng(seed).bytes(length)
    expected = bit_by_bit(data)
    assert crc32c(data) == expected
    assert crc32c(data[cut:], crc32c(data[:cut])) == expected


def test_crosses_the_chunk_border(crc32c) -> None:
    for surplus in (0, 1, 3, 4, 777):
        data = np.random.default_rng(0).bytes((1 << 20) + surplus)
        assert crc32c(data) == crc32c(data[1000:], crc32c(data[:1000]))
        crc = 0
        for start in range(0, len(data), 5003):
            crc = crc32c(data[start : start + 5003], crc)
        assert crc32c(data) == crc


def test_takes_arrays_by_their_bytes(crc32c) -> None:
    tokens = np.arange(1000, dtype="<u2")
    assert crc32c(tokens) == crc32c(tokens.tobytes()) == crc32c(memoryview(tokens.tobytes()))
    assert crc32c(tokens[500:], crc32c(tokens[:500])) == crc32c(tokens)
    assert crc32c(tokens[::2]) == crc32c(tokens[::2].tobytes())
