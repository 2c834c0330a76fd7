"""Places that Ray gave: which of them make an engine, and what a rank's process is told."""

from dataclasses import replace
from typing import Any

import pytest

from twofold import ConfigError, EngineArgs
from twofold.executor.places import Place, check_versions, count_nodes, environments
from twofold.executor.ray import check_installed

PLACE = Place("a", "10.0.0.1", "eth0", 8, (), "1.0")


def places(*nodes: str, **changes: Any) -> list[Place]:
    return [replace(PLACE, node_id=node, host=f"10.0.0.{ord(node) - 96}", **changes) for node in nodes]


def test_nodes_have_equally_many_ranks() -> None:
    """Rank r is on node r // ranks_per_node; a plan with more ranks on one node would put KV entries elsewhere."""
    assert count_nodes(places("a", "a")) == 1
    assert count_nodes(places("a", "a", "b", "b", "c", "c")) == 3
    with pytest.raises(ConfigError, match=r"Ray gave 3 on 10\.0\.0\.1, 1 on 10\.0\.0\.2; choose a prefill"):
        count_nodes(places("a", "a", "a", "b"))


def test_another_version_on_a_node_is_refused() -> None:
    """Messages are pickles of our classes: other versions of them fail in ways that nobody understands."""
    check_versions(places("a", "b"), "1.0")
    with pytest.raises(ConfigError, match=r"have the engine's Twofold 1\.0, and 10\.0\.0\.2 has 0\.9; install"):
        check_versions([*places("a"), *places("b", version="0.9")], "1.0")


def test_ranks_see_all_gpus_of_their_node_and_bind_to_its_address() -> None:
    """Ranks of a node read each other's memory, so each sees its node's GPUs, in the order of its ranks."""
    given = [*places("a", "a", gpus=("3",)), *places("b", "b", gpus=("0",), interface="ib0")]
    given[1] = replace(given[1], gpus=("1",))
    found = environments(given, 4)
    assert [one["CUDA_VISIBLE_DEVICES"] for one in found] == ["3,1", "3,1", "0,0", "0,0"]
    assert [one["NCCL_SOCKET_IFNAME"] for one in found] == ["eth0", "eth0", "ib0", "ib0"]
    assert found[0]["OMP_NUM_THREADS"] == "4"


def test_ranks_of_one_machine_bind_to_loopback_only() -> None:
    """Nobody asked for a port that others can reach."""
    assert {one["GLOO_SOCKET_IFNAME"] for one in environments(places("a", "a"), 1)} == {"lo"}


def test_ray_is_asked_for_by_vllms_name_and_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script of vLLM's says None or uni for one machine."""
    assert {
        EngineArgs("m", distributed_executor_backend=name).distributed_executor_backend for name in (None, "uni")
    } == {"mp"}
    assert EngineArgs("m", distributed_executor_backend="ray").distributed_executor_backend == "ray"
    with pytest.raises(ConfigError, match="distributed_executor_backend must be one of mp, ray, got 'slurm'"):
        EngineArgs("m", distributed_executor_backend="slurm")
    check_installed()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs Ray, which is not installed; pip install '\.\[ray\]'"):
        check_installed()


def test_an_engine_cannot_go_on_with_more_ranks_than_it_asks_for() -> None:
    with pytest.raises(ConfigError, match="min_ranks must be at most 2, the ranks that are asked for, got 3"):
        EngineArgs("m", prefill_context_parallel_size=2, min_ranks=3)
