"""Which rank holds the others up, from what was seen of all of them."""

import faulthandler
import tempfile
import threading
from dataclasses import replace

import pytest

from cluster.stacks import Look, describe, group, odd_ones, read_spied, read_stacks

TRAIN = ("/t/launch/train.py:30 train", "/t/launch/worker.py:9 main", "/t/cluster/entry.py:65 run_entry")
REDUCE = ("/t/parallel/communicator.py:195 all_reduce", *TRAIN)
WAITING = Look(0, "data", 3, 3.1, 3.0, "running", REDUCE, True)
READING = Look(1, "data", 3, 3.2, 3.0, "running", ("/t/data/stream.py:8 read", *TRAIN), False)

DUMP = """Thread 0x00007f (most recent call first):
  File "/usr/lib/python3.13/threading.py", line 363 in wait
  File "/t/cluster/process.py", line 35 in follow

Current thread 0x00007e [rank-1] (most recent call first):
  File "/v/torch/distributed/distributed_c10d.py", line 3000 in all_reduce
  File "/t/a folder/communicator.py", line 195 in all_reduce
  File "/t/cluster/entry.py", line 65 in run_entry
  File "/t/cluster/rank_process.py", line 44 in main
"""


def ranks_of(count: int, look: Look) -> list[Look]:
    return [replace(look, rank=rank) for rank in range(count)]


def test_the_stack_is_that_of_the_thread_that_trains() -> None:
    stack, waits = read_stacks(DUMP)
    assert stack[1] == "/t/a folder/communicator.py:195 all_reduce" and len(stack) == 4
    assert waits
    assert not read_stacks(DUMP.replace("torch/distributed", "torch/x").replace("communicator", "reader"))[1]
    assert read_stacks("") == ((), False) == read_stacks("Thread 0x1 (most recent call first):\n  <no Python frame>\n")


def test_backward_waits_where_one_of_its_own_threads_does() -> None:
    dump = (
        "Thread 0x1 (most recent call first):\n"
        '  File "/v/torch/distributed/distributed_c10d.py", line 1 in all_to_all_single\n\n'
        "Current thread 0x2 (most recent call first):\n"
        '  File "/v/torch/autograd/graph.py", line 5 in _engine_run_backward\n'
        '  File "/t/cluster/entry.py", line 65 in run_entry\n'
    )
    assert read_stacks(dump)[1]
    assert not read_stacks(dump.replace("/torch/autograd/", "/launch/"))[1]  # another thread's wait is its own affair


def test_the_stack_of_a_stopped_rank_is_that_of_the_same_thread() -> None:
    spied = (
        'Process 7: python -m x\nPython v3.13\n\nThread 8 (idle): "MainThread"\n    wait (threading.py:1)\n'
        "    run (a.py:2)\n    main (a.py:3)\n\nThread 9 (idle)\n    read (stream.py:8)\n    run_entry (entry.py:65)\n"
    )
    assert read_spied(spied) == ("read (stream.py:8)", "run_entry (entry.py:65)")
    assert read_spied("") == ()


def test_what_faulthandler_writes_here_is_understood() -> None:
    def run_entry() -> None:
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            found.append(read_stacks(file.read()))

    found: list = []
    thread = threading.Thread(target=run_entry)
    thread.start()
    thread.join()
    [(stack, waits)] = found
    assert stack[0].startswith(f"{__file__}:") and stack[0].endswith(" run_entry") and not waits


@pytest.mark.parametrize(
    ("looks", "odd", "why"),
    [
        ([WAITING, READING], [1], "wait for it"),
        ([WAITING, replace(WAITING, rank=1, state="stopped", stack=(), waits=False)], [1], "does not answer"),
        ([READING, replace(WAITING, rank=2, state="silent", stack=(), waits=False)], [2], "does not answer"),
        ([*ranks_of(4, WAITING), replace(WAITING, rank=4, step=2)], [4], "a step behind"),
        ([*ranks_of(4, WAITING), replace(WAITING, rank=4, stack=TRAIN)], [4], "elsewhere"),
        ([*ranks_of(2, WAITING), replace(WAITING, rank=2, stack=TRAIN), replace(WAITING, rank=3, stack=TRAIN)],
         [0, 1, 2, 3], "nothing tells"),
        (ranks_of(3, WAITING), [0, 1, 2], "nothing tells"),
        ([replace(one, state="silent") for one in ranks_of(2, WAITING)], [0, 1], "does not answer"),
        ([READING], [1], "nothing tells"),
    ],
)  # fmt: skip
def test_the_odd_one_is_named(looks: list[Look], odd: list[int], why: str) -> None:
    ranks, reason = odd_ones(looks)
    assert ranks == odd
    assert why in reason


def test_ranks_that_may_wait_for_an_unknown_one_are_left_alone() -> None:
    assert odd_ones(ranks_of(3, WAITING), complete=False)[0] == []
    assert odd_ones([*ranks_of(2, WAITING), replace(WAITING, rank=2, step=2)], complete=False)[0] == []
    assert odd_ones([READING], complete=False)[0] == [1]  # and where it hangs itself, its monitor needs no other
    assert odd_ones([WAITING, replace(WAITING, rank=2, state="stopped")], complete=False)[0] == [2]


def test_groups_do_not_depend_on_lines_and_are_told_once_each() -> None:
    other_line = replace(WAITING, rank=2, stack=("/t/parallel/communicator.py:197 all_reduce", *TRAIN))
    assert [[look.rank for look in one] for one in group([READING, other_line, WAITING])] == [[0, 2], [1]]
    text = describe([READING, other_line, WAITING])
    assert "rank 0, 2: waits for other ranks, section data, step 3" in text
    assert "rank 1: running, section data, step 3, 3.2 s\n    /t/data/stream.py:8 read" in text


def test_a_limit_of_nothing_is_never_over() -> None:
    assert WAITING.is_over and not replace(WAITING, limit_s=0.0).is_over and not replace(WAITING, seconds=3.0).is_over
