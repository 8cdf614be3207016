"""How a launch's end is judged from the reports of its ranks."""

from cluster.context import RankFailure
from cluster.outcome import by_cause, conclude, refused


def done(result):
    return {"ok": True, "result": result, "at": 1.0}


def failed(text, at, kind="exception", exit_code=1):
    return {"ok": False, "kind": kind, "error": text, "exit_code": exit_code, "at": at}


def test_all_results():
    result = conclude([done({"x": 1}), done({})])
    assert (result.exit_code, result.results, result.error, result.failures) == (0, [{"x": 1}, {}], "", ())


def test_one_stopped_rank_makes_it_a_stop():
    assert conclude([done({"status": "stopped"}), done({})], stop_asked=True).exit_code == 75


def test_a_failure_outweighs_a_stop_and_keeps_the_other_results():
    result = conclude([done({"status": "stopped"}), failed("Traceback: boom", 5.0)], stop_asked=True)
    assert result.exit_code == 1
    assert result.results == [{"status": "stopped"}, None]
    assert "rank 1 failed (exception):\nTraceback: boom" in result.error


def test_the_earliest_failure_is_the_cause():
    result = conclude([failed("connection closed by peer", 9.0), failed("the real one", 5.0)])
    assert [failure.rank for failure in result.failures] == [1, 0]
    assert "the real one" in result.error and "also failed: rank 0 (exception)" in result.error


def test_a_killed_rank_is_the_cause_though_its_peer_noticed_first():
    killed = RankFailure(1, "killed", "killed by SIGKILL", signal=9, observed_at=5.2)
    result = conclude([failed("connection closed by peer", 5.0), None], lost=[killed])
    assert result.failures[0].rank == 1
    assert result.error.startswith("rank 1 failed (killed, signal 9)")


def test_a_rank_killed_much_later_is_not_the_cause():
    late = RankFailure(1, "timeout", "did not end", observed_at=15.0)
    assert by_cause([late, RankFailure(0, "exception", "boom", observed_at=5.0)])[0].rank == 0


def test_a_rank_counts_once_even_if_it_reported_and_was_lost():
    lost = RankFailure(0, "killed", "gone", observed_at=5.0)
    assert len(conclude([failed("boom", 5.0), done({})], lost=[lost]).failures) == 1


def test_exit_status_of_the_cause_is_kept():
    assert conclude([failed("sys.exit(2)", 1.0, "exited", 2)]).exit_code == 2


def test_a_missing_report_is_not_a_success():
    result = conclude([done({}), None])
    assert result.exit_code == 1 and "rank [1]" in result.error


def test_refusal():
    assert refused(2, "too many").exit_code == 2
