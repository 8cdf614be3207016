"""Why ranks failed, in one word, from what is known of them."""

import pytest

from cluster.causes import Names, Place, cause_of, first_cause
from cluster.context import RankFailure

NAMES = Names(storage=("CheckpointError",), numeric=("NonFiniteError",))
TRAINING, STARTING = Place("backward", 7), Place("start")
GLOO = "Traceback ...\nRuntimeError: [gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:6580. This is typically"


def raised(*names: str, message: str = "boom", rank: int = 0) -> RankFailure:
    return RankFailure(rank, "exception", message, exception=(*names, "Exception"))


@pytest.mark.parametrize(
    ("failure", "place", "cause"),
    [
        (RankFailure(0, "killed", "", signal=9), TRAINING, "worker"),
        (RankFailure(0, "killed", "", signal=15), TRAINING, "preemption"),
        (RankFailure(0, "exited", "status 3"), TRAINING, "worker"),
        (RankFailure(0, "exited", "status 3"), STARTING, "user_error"),
        (RankFailure(0, "node", ""), TRAINING, "node"),
        (RankFailure(0, "capacity", ""), STARTING, "node"),
        (RankFailure(0, "timeout", ""), TRAINING, "hang"),
        (RankFailure(0, "start", ""), STARTING, "worker"),
        (raised("TypeError"), STARTING, "user_error"),
        (raised("TypeError"), Place("load"), "user_error"),
        (raised("TypeError"), TRAINING, "worker"),
        (raised("NonFiniteError", "FloatingPointError"), TRAINING, "numeric"),
        (raised("NonFiniteError", "FloatingPointError"), STARTING, "numeric"),
        (raised("CheckpointError", "RuntimeError"), Place("load"), "storage"),
        (raised("OSError"), TRAINING, "storage"),
        (raised("OSError"), STARTING, "storage"),
        (raised("FileNotFoundError", "OSError"), STARTING, "user_error"),
        (raised("FileNotFoundError", "OSError"), TRAINING, "storage"),
        (raised("RuntimeError", message=GLOO), STARTING, "worker"),
        (raised("RuntimeError", message="shape [3] is not [4]"), STARTING, "user_error"),
    ],
)
def test_the_cause(failure: RankFailure, place: Place, cause: str) -> None:
    assert cause_of(failure, place, NAMES) == cause


def test_news_of_a_lost_peer_never_hides_the_loss() -> None:
    news, node = raised("RuntimeError", message=GLOO), RankFailure(1, "node", "gone")
    assert first_cause([news, node]).rank == 1
    assert first_cause([news, raised("ValueError", rank=2)]).rank == 2
    assert first_cause([news]) is news
    mistake = raised("ValueError", message="connection closed by peer is what I say")
    assert first_cause([mistake, node]) is mistake


def test_a_place_reads_well() -> None:
    assert (str(TRAINING), str(STARTING)) == ("step 7", "section start")
