"""The plan's promises as properties: every token once, any number of ranks alike, no state, steps known beforehand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.batches import Batches, Phase
from data.best_fit import count_bins, pack_lengths
from data.errors import DataError
from data.order import derive_key, hash_numbers, permutation
from data.plan import Plan
from tests.unit.data_samples import SyntheticLengths, make_plan

SHARDS = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=12), min_size=1, max_size=7)
PACKINGS = st.sampled_from(["split", "best_fit"])


PINNED_PERMUTATION = [2, 9, 1, 5, 3, 6, 4, 8, 7, 0]
PINNED_PIECES = [
    [(1, 3, 6, 7), (1, 0, 0, 2), (2, 0, 0, 5)],
    [(2, 0, 29, 37)],
    [(2, 0, 61, 64), (1, 1, 0, 2), (0, 0, 0, 3)],
    [(0, 2, 13, 21)],
]
PINNED_BINS = [
    [(1, 3, 0, 7), (3, 1, 0, 3), (3, 0, 0, 3), (1, 0, 0, 2)],
    [(0, 1, 0, 9), (0, 0, 0, 5)],
    [(0, 2, 16, 30)],
    [(2, 0, 16, 32)],
]


def targets_of(plan: Plan, sequences: range | list[int]) -> Counter[tuple[int, int, int]]:
    """How often each (shard, row, token) is a target in these sequences."""
    return Counter(
        (piece.shard, piece.row, token)
        for sequence in sequences
        for piece in plan.pieces(sequence)
        for token in range(piece.start, piece.stop)
    )


def all_tokens(shards: list[list[int]], times: int = 1) -> Counter[tuple[int, int, int]]:
    return Counter(
        {
            (shard, row, token): times
            for shard, rows in enumerate(shards)
            for row, length in enumerate(rows)
            for token in range(length)
        }
    )


@settings(max_examples=80, deadline=None)
@given(shards=SHARDS, seq_len=st.integers(1, 30), seed=st.integers(0, 5), window=st.integers(1, 4))
def test_split_makes_every_token_a_target_exactly_once_an_epoch(
    shards: list[list[int]], seq_len: int, seed: int, window: int
) -> None:
    plan = make_plan(shards, seq_len=seq_len, seed=seed, window_shards=window)
    total = sum(map(sum, shards))
    # over seq_len epochs the row of tokens ends exactly at a sequence's end
    n_sequences = plan.epoch_start(seq_len)
    assert n_sequences == total
    assert targets_of(plan, range(n_sequences)) == all_tokens(shards, seq_len)
    # and within one epoch the surplus is less than one sequence
    counts = targets_of(plan, range(plan.epoch_start(1)))
    assert all(counts[token] >= 1 for token in all_tokens(shards))
    assert sum(counts.values()) - total < seq_len
    assert all(sum(p.stop - p.start for p in plan.pieces(s)) == seq_len for s in range(plan.epoch_start(1)))


@settings(max_examples=80, deadline=None)
@given(shards=SHARDS, seq_len=st.integers(1, 30), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_best_fit_makes_every_token_a_target_exactly_once_an_epoch(
    shards: list[list[int]], seq_len: int, seed: int, epoch: int
) -> None:
    plan = make_plan(shards, seq_len=seq_len, seed=seed, packing="best_fit")
    sequences = range(plan.epoch_start(epoch), plan.epoch_start(epoch + 1))
    assert targets_of(plan, sequences) == all_tokens(shards)
    assert all(0 < sum(p.stop - p.start for p in plan.pieces(s)) <= seq_len for s in sequences)
    # only documents longer than a sequence are cut
    for sequence in sequences:
        for piece in plan.pieces(sequence):
            length = shards[piece.shard][piece.row]
            assert length > seq_len or (piece.start, piece.stop) == (0, length)


@settings(max_examples=80, deadline=None)
@given(shards=SHARDS, packing=PACKINGS, lanes=st.integers(1, 50), n_epochs=st.integers(1, 3))
def test_the_order_is_a_bijection_of_every_epoch(
    shards: list[list[int]], packing: str, lanes: int, n_epochs: int
) -> None:
    plan = make_plan(shards, packing=packing, lanes=lanes)
    for epoch in range(n_epochs):
        numbers = np.arange(plan.epoch_start(epoch), plan.epoch_start(epoch + 1))
        ids = plan.sequence_ids(numbers)
        assert sorted(ids.tolist()) == numbers.tolist()
        assert all(plan.epoch_of(int(number)) == epoch for number in numbers)
        for lane in range(min(lanes, len(ids))):
            assert (np.diff(ids[lane::lanes]) == 1).all()  # a lane is a contiguous range
    everything = plan.sequence_ids(np.arange(plan.epoch_start(n_epochs)))
    assert len(set(everything.tolist())) == len(everything)


@settings(max_examples=50, deadline=None)
@given(
    shards=SHARDS,
    packing=PACKINGS,
    seed=st.integers(0, 3),
    history=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]), st.integers(1, 4), st.integers(0, 3)), max_size=8
    ),
)
def test_any_history_of_ranks_and_lost_steps_gives_the_undisturbed_batches(
    shards: list[list[int]], packing: str, seed: int, history: list[tuple[int, int, int]]
) -> None:
    """Each entry: this many ranks run this many steps, then a crash loses the last few."""
    size, step, committed = 24, 0, {}
    for n_ranks, n_steps, lost in history:
        plan = make_plan(shards, packing=packing, seed=seed)  # a new process: nothing but the step is carried over
        for now in range(step, step + n_steps):
            ranks = [plan.batch(now, size)[rank::n_ranks] for rank in range(n_ranks)]
            assert {len(ids) for ids in ranks} == {size // n_ranks}
            committed[now] = np.sort(np.concatenate(ranks)).tolist()
        step = max(0, step + n_steps - lost)
        committed = {now: ids for now, ids in committed.items() if now < step}
    undisturbed = make_plan(shards, packing=packing, seed=seed)
    assert committed == {now: np.sort(undisturbed.batch(now, size)).tolist() for now in range(step)}
    read = [sequence for ids in committed.values() for sequence in ids]
    assert len(read) == len(set(read))


def test_no_state_any_step_can_be_asked_first() -> None:
    shards = [[5, 9, 30], [2, 2, 2, 7], [64]]
    straight = make_plan(shards)
    expected = [[straight.pieces(int(s)) for s in straight.batch(step, 6)] for step in range(40)]
    for step in (39, 0, 17, 17, 3):
        fresh = make_plan(shards)
        assert [fresh.pieces(int(s)) for s in fresh.batch(step, 6)] == expected[step]


def test_everything_in_the_identity_changes_the_order() -> None:
    shards = [list(range(3, 40)), list(range(2, 60)), [100, 3, 3]]
    base: dict = {"fingerprint": "a", "seed": 0, "seq_len": 8, "packing": "split", "lanes": 4, "window_shards": 1}

    def order(**changes: object) -> list:
        plan = make_plan(shards, **{**base, **changes})
        return [plan.pieces(int(sequence)) for sequence in plan.batch(0, 40)]

    assert order() == order()
    for changes in (
        {"fingerprint": "b"},
        {"seed": 1},
        {"seq_len": 9},
        {"packing": "best_fit"},
        {"lanes": 8},
        {"window_shards": 2},
    ):
        assert order(**changes) != order(), changes
        assert make_plan(shards, **{**base, **changes}).digest() != make_plan(shards, **base).digest()


def test_epochs_differ_in_order() -> None:
    for packing in ("split", "best_fit"):
        for shards in ([[4, 4, 4, 4]] * 6, [[4] * 24]):  # shards shuffled, and documents inside the only window
            plan = make_plan(shards, seq_len=4, packing=packing)
            assert plan.epoch_start(1) == 24
            first, second = ([plan.pieces(s) for s in range(24 * e, 24 * e + 24)] for e in (0, 1))
            assert first != second
            assert sorted(first) == sorted(second)


def test_steps_are_known_beforehand_and_the_tail_is_carried_over() -> None:
    plan = make_plan([[10] * 10], seq_len=7)  # 100 tokens: 15 sequences, the last one reaches 5 tokens further
    assert plan.epoch_steps(4) == (15, 3, 3)
    assert [plan.epoch_start(epoch) for epoch in range(4)] == [0, 15, 29, 43]
    assert {plan.epoch_of(int(s)) for s in plan.batch(3, 4)} == {0, 1}


def test_a_corpus_smaller_than_a_batch_goes_round() -> None:
    plan = make_plan([[3]], seq_len=16, lanes=4)
    assert targets_of(plan, plan.batch(0, 3).tolist()) == all_tokens([[3]], 16)


def test_pinned_order() -> None:
    """The order is a promise to saved runs: a change here needs a new PLAN_VERSION."""
    assert permutation(10, derive_key("a", 1)).tolist() == PINNED_PERMUTATION
    plan = make_plan([[5, 9, 30], [2, 2, 2, 7], [64]], lanes=4)
    assert [plan.pieces(int(sequence)) for sequence in plan.batch(1, 4)] == PINNED_PIECES
    shards = [[5, 9, 30], [2, 2, 2, 7], [64], [3, 3, 20, 11]]
    plan = make_plan(shards, lanes=4, packing="best_fit", seq_len=16)
    assert [plan.pieces(int(sequence)) for sequence in plan.batch(1, 4)] == PINNED_BINS


@pytest.mark.parametrize("n", [0, 1, 2, 1000, 40_000])
@pytest.mark.parametrize("n_classes", [1, 2, 300, 1 << 50])
def test_permutations_sort_by_class_and_whole_hash(n: int, n_classes: int) -> None:
    """Also where the class and the place leave so few bits of the hash that many are alike (the last one)."""
    hashes = hash_numbers(np.arange(n), 7)
    assert permutation(n, 7).tolist() == np.argsort(hashes).tolist()
    classes = np.random.default_rng(n).integers(0, min(n_classes, 300), n).astype(np.uint16)
    assert permutation(n, 7, classes, n_classes).tolist() == np.lexsort((hashes, classes)).tolist()


def test_permutations_are_even() -> None:
    """Each item lands on each place about equally often (chi-squared, 7 x 7 cells)."""
    n, rounds = 7, 7000
    table = np.zeros((n, n))
    for key in range(rounds):
        table[np.arange(n), permutation(n, derive_key("even", key))] += 1
    chi_squared = float(((table - rounds / n) ** 2 / (rounds / n)).sum())
    assert chi_squared < 70.0  # 36 degrees of freedom; beyond 70 by chance once in 1800 tests
    hashes = hash_numbers(np.arange(100_000), 5)
    assert len(np.unique(hashes)) == 100_000


@settings(max_examples=100, deadline=None)
@given(
    capacity=st.integers(2, 40),
    draws=st.lists(st.integers(1, 10**6), max_size=60),
)
@example(capacity=10, draws=[3] * 6 + [1])  # three bins of two pieces each, one of which gets a third
def test_grouped_best_fit_equals_the_plain_one(capacity: int, draws: list[int]) -> None:
    sizes = [draw % (capacity - 1) + 1 if capacity > 1 else 1 for draw in draws]
    rooms: list[int] = []
    bins: list[list[int]] = []
    for size in sorted(sizes, reverse=True):
        fitting = [index for index, room in enumerate(rooms) if room >= size]
        if fitting:
            best = min(fitting, key=lambda index: rooms[index])
        else:
            best = len(rooms)
            rooms.append(capacity)
            bins.append([])
        rooms[best] -= size
        bins[best].append(size)
    groups = list(zip(*pack_lengths(histogram(sizes, capacity), capacity), strict=True))
    contents = [content for n_bins, content in groups for content in [expanded(content)] * n_bins]
    # bins with equal room are interchangeable: which of them takes a piece changes no later choice
    assert sorted(map(sum, contents)) == sorted(map(sum, bins))
    assert sorted(size for content in contents for size in content) == sorted(sizes)
    handed_out = sorted(
        (size, first + number * each + place)
        for n_bins, content in groups
        for size, first, each in content
        for number in range(n_bins)
        for place in range(each)
    )
    assert handed_out == sorted((size, number) for size in set(sizes) for number in range(sizes.count(size)))
    assert count_bins(histogram(sizes, capacity), capacity) == len(contents)


def histogram(sizes: list[int], capacity: int) -> np.ndarray:
    return np.bincount(np.array(sizes, np.int64), minlength=capacity)


def expanded(content: list[tuple[int, int, int]]) -> list[int]:
    return [size for size, _, each in content for _ in range(each)]


def test_batches_ramp_and_skip() -> None:
    ramp = Batches.constant(4).then(3, 8)
    assert [ramp.size(step) for step in (0, 2, 3, 9)] == [4, 4, 8, 8]
    assert ramp.numbers(3).tolist() == list(range(12, 20))
    skipping = ramp.skipping(1)
    assert skipping.skip_ranges == ((4, 8),)
    assert skipping.numbers(0).tolist() == [0, 1, 2, 3]
    assert skipping.numbers(1).tolist() == [8, 9, 10, 11]
    again = skipping.skipping(1, 2)
    assert again.skip_ranges == ((4, 16),)
    apart = skipping.skipping(3)
    assert apart.skip_ranges == ((4, 8), (16, 24))
    assert apart.numbers(2).tolist() == [12, 13, 14, 15]
    assert apart.numbers(3).tolist() == list(range(24, 32))
    around = Batches.constant(4).skipping(2).skipping(1, 2)  # a range that spans an earlier hole
    assert around.skip_ranges == ((4, 16),)


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 6),
    edits=st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(1, 5)), max_size=5),
)
def test_ramps_and_skips_read_every_other_number_once(size: int, edits: list[tuple[bool, int, int]]) -> None:
    batches, floor = Batches.constant(size), 0
    for ramp, step, amount in edits:
        step = max(step, floor)  # history is not rewritten, only what comes after it
        batches = batches.then(step, amount) if ramp else batches.skipping(step, amount)
        floor = step
    read = [number for step in range(30) for number in batches.numbers(step).tolist()]
    skipped = {number for start, stop in batches.skip_ranges for number in range(start, stop)}
    assert read == [number for number in range(read[-1] + 1) if number not in skipped]


@pytest.mark.parametrize(
    "phases",
    [(), (Phase(1, 0, 4),), (Phase(0, 0, 0),), (Phase(0, 0, 4), Phase(2, 9, 4)), (Phase(0, 0, 4), Phase(0, 0, 4))],
)
def test_impossible_batches_are_refused(phases: tuple[Phase, ...]) -> None:
    with pytest.raises(DataError):
        Batches(phases)


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(DataError, match="no tokens"):
        Plan(SyntheticLengths([]), fingerprint="x", seed=0, seq_len=4)


@settings(max_examples=150, deadline=None)
@given(shards=SHARDS, seq_len=st.integers(1, 50), packing=PACKINGS, first=st.integers(0, 300), count=st.integers(1, 40))
def test_sequences_taken_together_are_those_taken_alone(
    shards: list[list[int]], seq_len: int, packing: str, first: int, count: int
) -> None:
    """Blocks of sequences, over the borders of windows and epochs, hold what each sequence holds by itself."""
    plan = make_plan(shards, seq_len=seq_len, packing=packing)
    together = plan._order.table(first, count).by_sequence(count)
    alone = [plan._order.table(sequence, 1).by_sequence(1)[0] for sequence in range(first, first + count)]
    assert together == alone
    assert together == plan.table(np.arange(first, first + count)).by_sequence(count)
    assert together[::-1] == plan.table(np.arange(first, first + count)[::-1]).by_sequence(count)
    assert alone == [plan.pieces(sequence) for sequence in range(first, first + count)]
    assert all(pieces for pieces in alone)
