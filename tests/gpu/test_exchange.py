"""Both ways to exchange rows leave the same bytes in every rank's pages."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from twofold.parallel.exchange import AllGatherExchange, ExchangePlan, PushExchange
from twofold.parallel.mesh import ProcessMesh

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

NUM_LAYERS, NUM_SLOTS, WIDTH = 5, 4096, 2 * 8 * 128


def run_rank(rank: int, size: int, folder: str) -> None:
    device = torch.device(f"cuda:{rank}")
    torch.cuda.set_device(device)
    mesh = ProcessMesh(rank, size, f"{folder}/store", device)
    exchanges = {
        "all_gather": AllGatherExchange(mesh, device),
        "push": PushExchange(mesh, device, max_num_bytes=1024 * WIDTH * 2),  # the longest step does not fit
    }
    for name, exchange in exchanges.items():
        caches = [torch.zeros(NUM_SLOTS, WIDTH, dtype=torch.bfloat16, device=device) for _ in range(NUM_LAYERS)]
        busy = torch.randn(2048, 2048, device=device)
        for step, num_rows in enumerate((1, 100, 512, 3, 513, 64)):
            mine = torch.Generator(device).manual_seed(1000 * step + rank)
            everyone = torch.Generator().manual_seed(step)
            slots = 1 + torch.randperm(NUM_SLOTS - 1, generator=everyone)[: size * num_rows]
            exchange.begin(ExchangePlan(slots.to(device)))
            for cache in caches:
                rows = torch.randn(num_rows, WIDTH, dtype=torch.bfloat16, device=device, generator=mine)
                exchange.publish(rows, cache)
                if rank == step % size:  # ranks are not equally fast
                    busy = torch.nn.functional.normalize(busy @ busy)
                exchange.complete()
        torch.cuda.synchronize()
        torch.save([cache.cpu() for cache in caches], f"{folder}/{name}-{rank}")
    mesh.close()


def test_all_exchanges_leave_the_same_bytes_on_all_ranks(tmp_path: Path) -> None:
    """Invariant 4, with ranks out of step, steps longer than the push buffers, and buffers used again at once."""
    size = min(torch.cuda.device_count(), 4)
    mp.spawn(run_rank, (size, str(tmp_path)), nprocs=size)
    expected = torch.load(tmp_path / "all_gather-0")
    assert all(cache.count_nonzero() > 0 for cache in expected)
    for name in ("all_gather", "push"):
        for rank in range(size):
            caches = torch.load(tmp_path / f"{name}-{rank}")
            for layer, (cache, other) in enumerate(zip(caches, expected, strict=True)):
                assert torch.equal(cache.view(torch.int16), other.view(torch.int16)), (name, rank, layer)
