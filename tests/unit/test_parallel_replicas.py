"""Comparing what ranks must hold alike: any one bit shows, and the rank that differs is named."""

import pytest
import torch

from parallel.replicas import checksum, describe


@pytest.mark.parametrize(
    ("dtype", "width", "bits"),
    [(torch.float32, torch.int32, 32), (torch.bfloat16, torch.int16, 16), (torch.float64, torch.int64, 64)],
)
def test_every_bit_shows(dtype: torch.dtype, width: torch.dtype, bits: int) -> None:
    values = torch.randn(33, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = checksum(values)
    for bit in range(bits):
        other = values.clone()
        other.view(width)[bit % 33] ^= torch.tensor(1, dtype=torch.int64).bitwise_left_shift(bit).to(width)
        assert checksum(other) != before, bit
    assert checksum(values.clone()) == before
    assert checksum(values.view(3, 11).T) != 0


def test_a_zero_with_a_sign_is_another_bit_pattern() -> None:
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))


def test_the_rank_that_differs_from_most_is_named() -> None:
    alike = {"embed": 1, "head": 2}
    said = describe([alike, {**alike, "head": 3}, alike])
    assert said.startswith("rank 1 differs from most in head: ")
    said = describe([{"a": 1}, {"a": 9}, {"a": 1}, {"a": 1}, {"a": 7}])
    assert said.startswith("rank 1 differs from most in a; rank 4 differs from most in a: ")


def test_two_ranks_that_differ_are_both_named() -> None:
    assert describe([{"a": 1}, {"a": 2}]).startswith("no value is that of most in a (ranks [0] and [1]): ")


def test_experts_are_compared_with_those_that_hold_them() -> None:
    ranks = [{"w": 1, "e (expert-parallel rank 0)": 5}, {"w": 1, "e (expert-parallel rank 1)": 6},
             {"w": 1, "e (expert-parallel rank 0)": 5}, {"w": 1, "e (expert-parallel rank 1)": 6},
             {"w": 1, "e (expert-parallel rank 0)": 4}, {"w": 1, "e (expert-parallel rank 1)": 6}]  # fmt: skip
    assert describe(ranks).startswith("rank 4 differs from most in e (expert-parallel rank 0): ")


def test_many_parameters_are_listed_shortly() -> None:
    names = {f"p{n}": n for n in range(20)}
    said = describe([names, names, dict.fromkeys(names, -1)])
    assert "p7 and 12 more: " in said
