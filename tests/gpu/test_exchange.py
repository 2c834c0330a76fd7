"""Both transports leave the same bytes in every rank's cache, launched one by one or from a CUDA graph."""

import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from exchange_steps import (
    MAX_NUM_ENTRIES,
    NUMS_OF_ENTRIES,
    WIDTHS,
    assert_equal,
    entries_of,
    expected_caches,
    make_cache,
    slots_of,
    take_steps,
)
from one_gpu import share_gpu

from twofold.parallel.exchange import Exchange, ExchangePlan
from twofold.parallel.mesh import ProcessMesh
from twofold.parallel.transport import AllGather, Push

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

NUM_REPLAYS, GRAPH_ENTRIES = 12, 64


def run_rank(rank: int, size: int, folder: str) -> None:
    if torch.cuda.device_count() < size:
        share_gpu()
    device = torch.device(f"cuda:{rank % torch.cuda.device_count()}")
    torch.cuda.set_device(device)
    mesh = ProcessMesh.join(rank, size, f"{folder}/store", device)
    exchanges = {
        "all_gather": Exchange(mesh, AllGather(mesh, device)),
        "push": Exchange(mesh, Push(mesh, device, MAX_NUM_ENTRIES * max(WIDTHS) * 2)),
    }
    for name, exchange in exchanges.items():
        torch.save(
            take_steps(exchange, rank, size, device, lambda: torch.cuda._sleep(10**6)), f"{folder}/{name}-{rank}"
        )
        for defer_exchange in (False, True):
            caches = replay_steps(exchange, rank, size, device, defer_exchange)
            torch.save(caches, f"{folder}/{name}-graph-{defer_exchange}-{rank}")
    mesh.close()


def replay_steps(
    exchange: Exchange, rank: int, size: int, device: torch.device, defer_exchange: bool
) -> list[torch.Tensor]:
    """Replays one graph step after step; nothing between two steps makes ranks wait for each other."""
    cache = make_cache(device)
    slots = torch.zeros(size * GRAPH_ENTRIES, dtype=torch.long, device=device)
    entries = [entries_of(0, rank, layer, GRAPH_ENTRIES).to(device) for layer in range(len(WIDTHS))]

    def step_once() -> None:
        exchange.begin(ExchangePlan(slots, defer_exchange, False))
        for mine, cache_slots in zip(entries, cache.slots, strict=True):
            exchange.publish(mine, cache_slots)
            exchange.complete()
        exchange.end(cache.stacks)

    step_once()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step_once()
    inputs = [
        (
            slots_of(step, size * GRAPH_ENTRIES).to(device),
            [entries_of(step, rank, layer, GRAPH_ENTRIES).to(device) for layer in range(len(WIDTHS))],
        )
        for step in range(NUM_REPLAYS)
    ]
    torch.cuda.synchronize()
    for step, (step_slots, step_entries) in enumerate(inputs):
        slots.copy_(step_slots)
        for static, mine in zip(entries, step_entries, strict=True):
            static.copy_(mine)
        if rank == step % size:
            torch.cuda._sleep(10**7)
        graph.replay()
    torch.cuda.synchronize()
    return [cache_slots.cpu() for cache_slots in cache.slots]


def test_all_ranks_get_all_entries(tmp_path: Path) -> None:
    """Invariant 4, with ranks out of step, steps longer than the push buffers, and buffers used again at once.

    A graph uses the two buffers that it was captured with. With an odd number of layers it ends with the one that the
    next replay begins with, so a fast rank overwrote entries that a slow one had not read yet. So a step begins with a
    barrier.
    """
    size = max(2, min(torch.cuda.device_count(), 4))
    mp.spawn(run_rank, (size, str(tmp_path)), nprocs=size)
    launched, replayed = (expected_caches(size, nums) for nums in (NUMS_OF_ENTRIES, [GRAPH_ENTRIES] * NUM_REPLAYS))
    for name in ("all_gather", "push"):
        for rank in range(size):
            assert_equal(torch.load(tmp_path / f"{name}-{rank}"), launched, (name, rank))
            for defer_exchange in (False, True):
                kind = f"{name}-graph-{defer_exchange}-{rank}"
                assert_equal(torch.load(tmp_path / kind), replayed, kind)
