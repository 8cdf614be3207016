"""Which nodes of a Ray cluster count, and how many ranks they hold; the nodes are made up."""

import pytest

from cluster import ray_pool
from cluster.config import ClusterConfig
from cluster.context import RankFailure
from cluster.ray_nodes import Node
from cluster.ray_pool import RayPool


class Cluster:
    """Nodes with two CPUs each; `dead` take no connections though Ray takes them for living."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, names: str, one_machine: bool = False) -> None:
        self.names, self.dead, self.draining, self.address = list(names), set(), set(), {}
        monkeypatch.setattr(ray_pool, "living_nodes", lambda: [
            Node(name, "host" if one_machine else self.address.get(name, f"host-{name}"), 1, {"CPU": 2.0})
            for name in self.names
        ])  # fmt: skip
        monkeypatch.setattr(ray_pool, "draining_nodes", lambda: self.draining)
        monkeypatch.setattr(Node, "answers", lambda node: node.id not in self.dead)


def pool(workers: int, nodes: int = 1, min_workers: int = 1, legal=lambda limit: limit or None) -> RayPool:
    return RayPool(ClusterConfig(workers=workers, nodes=nodes, min_workers=min_workers, accelerator="cpu"), legal)


def lost(node: str, kind: str = "killed") -> RankFailure:
    return RankFailure(0, kind, "gone", node=node)


def test_ranks_are_counted_as_they_will_be_placed(monkeypatch) -> None:
    Cluster(monkeypatch, "abc")
    assert pool(6).available() == 6
    assert pool(3, nodes=3).available() == 3  # one on each
    assert pool(8, nodes=2).available() == 0  # no node holds four
    assert (pool(6, nodes=3).shape(4).nodes, pool(6, nodes=3).shape(3).nodes, pool(6).shape(4).nodes) == (2, 1, 1)


def test_a_node_that_lost_a_rank_is_asked_whether_it_is_there(monkeypatch) -> None:
    cluster, mine = Cluster(monkeypatch, "abc"), pool(6)
    cluster.dead.add("a")
    assert mine.available() == 6  # nobody has asked yet
    mine.blame(lost("a", "node"))
    assert mine.available() == 4


@pytest.mark.parametrize("one_machine", [False, True])
def test_a_node_that_fails_twice_is_avoided_as_long_as_the_rest_can_run(monkeypatch, one_machine: bool) -> None:
    Cluster(monkeypatch, "abc", one_machine)
    mine = pool(6, min_workers=4)
    mine.blame(lost("b"))
    assert mine.avoided() == []
    mine.blame(lost("b"))
    assert (mine.avoided(), mine.available()) == (["b"], 4)
    needs_all = pool(6, min_workers=6)
    needs_all.blame(lost("b"))
    needs_all.blame(lost("b"))
    assert (needs_all.avoided(), needs_all.available()) == ([], 6)


def test_a_node_that_comes_back_under_a_new_id_is_known_by_its_address(monkeypatch) -> None:
    cluster, mine = Cluster(monkeypatch, "abc"), pool(6)
    assert mine.avoided() == []
    for name in ("b", "d"):
        cluster.names = ["a", "c"]
        mine.blame(lost(name, "node"))
        cluster.names = ["a", "c", "d"]
        cluster.address = {"d": "host-b"}
        assert mine.avoided() == (["d"] if name == "d" else [])


def test_a_drain_notice_for_a_node_in_use_asks_the_ranks_to_leave(monkeypatch) -> None:
    cluster, mine = Cluster(monkeypatch, "abc"), pool(6)
    mine.in_use = {"a", "b"}
    cluster.draining = {"c"}
    assert (mine.leaving(), mine.available()) == ("", 4)
    cluster.draining = {"b"}
    assert "drained" in mine.leaving()
