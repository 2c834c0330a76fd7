"""Both ways to exchange rows leave the same bytes in every rank's pages, launched one by one or from a CUDA graph."""

import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent))
from one_gpu import share_gpu

from twofold.parallel.exchange import AllGatherExchange, ExchangePlan, PushExchange
from twofold.parallel.mesh import ProcessMesh

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

NUM_LAYERS, NUM_SLOTS, WIDTH = 5, 4096, 2 * 8 * 128  # an odd number of layers ends on the buffer that it began with
GRAPH_ROWS = 64


def run_rank(rank: int, size: int, folder: str) -> None:
    if torch.cuda.device_count() < size:
        share_gpu()
    device = torch.device(f"cuda:{rank % torch.cuda.device_count()}")
    torch.cuda.set_device(device)
    mesh = ProcessMesh(rank, size, f"{folder}/store", device)
    exchanges = {
        "all_gather": AllGatherExchange(mesh, device),
        "push": PushExchange(mesh, device, max_num_bytes=1024 * WIDTH * 2),  # the longest step does not fit
    }
    for name, exchange in exchanges.items():
        torch.save(launched(exchange, rank, size, device), f"{folder}/{name}-{rank}")
        torch.save(replayed(exchange, rank, size, device), f"{folder}/{name}-graph-{rank}")
    mesh.close()


def slots_of(step: int, num_rows: int) -> torch.Tensor:
    everyone = torch.Generator().manual_seed(step)
    return 1 + torch.randperm(NUM_SLOTS - 1, generator=everyone)[:num_rows]


def empty_caches(device: torch.device) -> list[torch.Tensor]:
    return [torch.zeros(NUM_SLOTS, WIDTH, dtype=torch.bfloat16, device=device) for _ in range(NUM_LAYERS)]


def launched(exchange: AllGatherExchange, rank: int, size: int, device: torch.device) -> list[torch.Tensor]:
    caches, busy = empty_caches(device), torch.randn(2048, 2048, device=device)
    for step, num_rows in enumerate((1, 100, 512, 3, 513, 64)):
        mine = torch.Generator(device).manual_seed(1000 * step + rank)
        exchange.begin(ExchangePlan(slots_of(step, size * num_rows).to(device)))
        for cache in caches:
            rows = torch.randn(num_rows, WIDTH, dtype=torch.bfloat16, device=device, generator=mine)
            exchange.publish(rows, cache)
            if rank == step % size:  # ranks are not equally fast
                busy = torch.nn.functional.normalize(busy @ busy)
            exchange.complete()
    torch.cuda.synchronize()
    return [cache.cpu() for cache in caches]


def replayed(exchange: AllGatherExchange, rank: int, size: int, device: torch.device) -> list[torch.Tensor]:
    """Step after step from one graph, with nothing between them that ranks would wait for."""
    caches, busy = empty_caches(device), torch.randn(2048, 2048, device=device)
    slots = torch.zeros(size * GRAPH_ROWS, dtype=torch.long, device=device)
    layers = torch.zeros(NUM_LAYERS, GRAPH_ROWS, WIDTH, dtype=torch.bfloat16, device=device)

    def step_once() -> None:
        exchange.begin(ExchangePlan(slots))
        for rows, cache in zip(layers, caches, strict=True):
            exchange.publish(rows, cache)
            exchange.complete()

    step_once()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step_once()
    steps = range(12)
    all_slots = torch.stack([slots_of(step, size * GRAPH_ROWS) for step in steps]).to(device)
    mine = torch.Generator(device).manual_seed(rank)
    all_rows = [torch.randn(layers.shape, dtype=layers.dtype, device=device, generator=mine) for _ in steps]
    torch.cuda.synchronize()
    for step in steps:
        slots.copy_(all_slots[step])
        layers.copy_(all_rows[step])
        if rank == step % size:
            for _ in range(8):
                busy = torch.nn.functional.normalize(busy @ busy)
        graph.replay()
    torch.cuda.synchronize()
    return [cache.cpu() for cache in caches]


def test_all_exchanges_leave_the_same_bytes_on_all_ranks(tmp_path: Path) -> None:
    """Invariant 4, with ranks out of step, steps longer than the push buffers, and buffers used again at once.

    A graph uses the two buffers that it was recorded with. With an odd number of layers it ends with the one that the
    next replay begins with, so a fast rank overwrote rows that a slow one had not read yet, until steps began with a
    barrier.
    """
    size = max(2, min(torch.cuda.device_count(), 4))
    mp.spawn(run_rank, (size, str(tmp_path)), nprocs=size)
    for kind in ("", "-graph"):
        expected = torch.load(tmp_path / f"all_gather{kind}-0")
        assert all(cache.count_nonzero() > 0 for cache in expected)
        for name in ("all_gather", "push"):
            for rank in range(size):
                caches = torch.load(tmp_path / f"{name}{kind}-{rank}")
                for layer, (cache, other) in enumerate(zip(caches, expected, strict=True)):
                    assert torch.equal(cache.view(torch.int16), other.view(torch.int16)), (name, kind, rank, layer)
