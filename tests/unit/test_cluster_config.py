"""The cluster section refuses what cannot run, with key, value and a way out."""

import pytest

from cluster.config import ClusterConfig


def test_defaults_have_no_problems():
    assert ClusterConfig().problems() == []


@pytest.mark.parametrize(
    ("change", "key", "way_out"),
    [
        ({"workers": 0}, "cluster.workers = 0", "at least 1"),
        ({"nodes": 0}, "cluster.nodes = 0", "at least 1"),
        ({"nodes": 3, "workers": 8}, "cluster.workers = 8", "use 6 or 9 workers"),
        ({"nodes": 4, "workers": 2}, "cluster.workers = 2", "use 4 workers"),
        ({"accelerator": "tpu"}, "cluster.accelerator = 'tpu'", "'auto', 'cpu' or 'gpu'"),
        ({"threads_per_worker": -1}, "cluster.threads_per_worker = -1", "0 (cores divided by workers)"),
        ({"start_timeout_s": 0.0}, "cluster.start_timeout_s = 0.0", "more than 0 seconds"),
        ({"stop_grace_s": -5.0}, "cluster.stop_grace_s = -5.0", "more than 0 seconds"),
        ({"capacity_wait_s": -1.0}, "cluster.capacity_wait_s = -1.0", "0 (do not wait)"),
        ({"limit_step_s": -1.0}, "cluster.limit_step_s = -1.0", "0 (no limit)"),
        ({"limit_data_s": -1.0}, "cluster.limit_data_s = -1.0", "0 (no limit)"),
    ],
)
def test_each_rule_names_key_value_and_way_out(change, key, way_out):
    [problem] = ClusterConfig(**change).problems()
    assert problem.startswith(key)
    assert way_out in problem


def test_all_problems_are_reported_together():
    assert len(ClusterConfig(workers=0, accelerator="x", stop_grace_s=0).problems()) == 3
