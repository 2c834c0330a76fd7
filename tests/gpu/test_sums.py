"""Every way to sum between GPUs gives the same bits on every rank, launched one by one or from CUDA graphs."""

import random
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from one_gpu import share_gpu
from sum_steps import MAX_NUM_ROWS, WIDTH, assert_right, take_sums

from twofold.parallel.mesh import ProcessMesh
from twofold.parallel.sums import GatherSum, Sum, SymmetricSum, make_sum, summing

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

WAYS = ("push", "one_shot", "two_shot", "nccl")
MAX_NUM_BYTES = MAX_NUM_ROWS * WIDTH * 4
NUM_ROUNDS, GRAPH_SHAPES = (
    40,
    [(1, 64), (32, 64), (5, 4096)],
)  # an odd number of sums, so that buffers change their turn


def run_rank(rank: int, size: int, folder: str) -> None:
    if torch.cuda.device_count() < size:
        share_gpu()
    device = torch.device(f"cuda:{rank % torch.cuda.device_count()}")
    torch.cuda.set_device(device)
    mesh = ProcessMesh.join(rank, size, f"{folder}/store", device)
    ways: dict[str, Sum] = {"gather": GatherSum(mesh)}
    for way in WAYS:
        ways[way] = SymmetricSum(mesh, device, MAX_NUM_BYTES, choices=((MAX_NUM_BYTES, way),))
    ways["measured"] = SymmetricSum(mesh, device, MAX_NUM_BYTES)
    ways["made"] = make_sum(mesh, device, MAX_NUM_BYTES, -1)
    for name, way in ways.items():
        torch.save(take_sums(way, rank, device, lambda: torch.cuda._sleep(10**6)), f"{folder}/{name}-{rank}")
        torch.save(replay_sums(way, rank, device), f"{folder}/{name}-graph-{rank}")
    for name in WAYS:
        check_norm(ways[name], mesh, device)
    mesh.close()


def inputs_of(number: int, rank: int) -> list[torch.Tensor]:
    mine = torch.Generator().manual_seed(1000 * number + rank)
    return [torch.randn(shape, generator=mine).bfloat16() for shape in GRAPH_SHAPES]


def replay_sums(way: Sum, rank: int, device: torch.device) -> list[list[torch.Tensor]]:
    """Two graphs and sums that are launched one by one, in an order that is the same on all ranks; at random a rank is
    slow. Nothing else makes ranks wait for each other."""
    static = [x.to(device) for x in inputs_of(0, rank)]
    graphs: list[tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]] = []
    with summing(way):
        for x in static:
            torch.ops.twofold.sum_over_ranks(x)
        torch.cuda.synchronize()
        for num_sums in (3, 2):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                sums = [torch.ops.twofold.sum_over_ranks(x) for x in static[:num_sums]]
            graphs.append((graph, sums))
        order, lags, results = random.Random(0), random.Random(1 + rank), []
        inputs = [[x.to(device) for x in inputs_of(number, rank)] for number in range(NUM_ROUNDS)]
        torch.cuda.synchronize()
        for mine in inputs:
            for x, new in zip(static, mine, strict=True):
                x.copy_(new)
            if lags.random() < 0.3:
                torch.cuda._sleep(10**6)
            kind = order.randrange(3)
            if kind < 2:
                graphs[kind][0].replay()
                results.append([total.clone() for total in graphs[kind][1]])
            else:
                results.append([torch.ops.twofold.sum_over_ranks(x) for x in static])
    torch.cuda.synchronize()
    return [[total.cpu() for total in sums] for sums in results]


def check_norm(way: Sum, mesh: ProcessMesh, device: torch.device) -> None:
    """Sums with what follows them have the bits of separate kernels, between sums of other sizes; the largest have no
    room in the buffers."""
    ops = torch.ops.twofold
    for num_rows, width in ((1, 64), (7, 48), (3, 4096), (1, 1024), (500, 80)) * 5:
        everyone = torch.Generator(device).manual_seed(num_rows)
        residual = torch.randn(1, num_rows, width, generator=everyone, device=device).bfloat16()
        weight = torch.rand(width, generator=everyone, device=device).bfloat16()
        mine = torch.Generator(device).manual_seed(100 + mesh.rank)
        x = torch.randn(num_rows, width, generator=mine, device=device).bfloat16()
        with summing(way):
            added, normed = ops.sum_add_norm(x, residual, weight, 1e-5)
            added_alone = ops.sum_add(x, residual)
            right = residual + ops.sum_over_ranks(x)
        wide = right.float()
        unit = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).bfloat16()
        assert torch.equal(added, right)
        assert torch.equal(added_alone, right)
        torch.testing.assert_close(normed, weight * unit, rtol=1e-2, atol=1e-5)
        everyones = normed.new_empty(mesh.size * num_rows, width)
        mesh.all_gather(everyones, normed[0])
        assert torch.equal(everyones[:num_rows], everyones[-num_rows:])


def test_all_ranks_get_the_same_sums(tmp_path: Path) -> None:
    """Ranks out of step, sums of changing sizes one right after the other, some larger than the buffers; then graphs
    with an odd and an even number of sums, replayed in any order with launched sums between.

    With more than two ranks, PyTorch's kernels and NCCL round after each addition, so only our own are compared with
    the sum in float32.
    """
    size = max(2, min(torch.cuda.device_count(), 4))
    mp.spawn(run_rank, (size, str(tmp_path)), nprocs=size)
    for name in ("gather", *WAYS, "measured", "made"):
        results = [torch.load(tmp_path / f"{name}-{rank}") for rank in range(size)]
        replayed = [torch.load(tmp_path / f"{name}-graph-{rank}") for rank in range(size)]
        for rank in range(size):
            assert all(map(torch.equal, results[rank], results[0])), (name, rank)
            for sums, first in zip(replayed[rank], replayed[0], strict=True):
                assert all(map(torch.equal, sums, first)), (name, rank)
        if size == 2 or name == "gather":
            assert_right(results[0], size, name)
        for number, sums in enumerate(replayed[0]):
            parts = [inputs_of(number, rank) for rank in range(size)]
            for shape_idx, total in enumerate(sums):
                right = parts[0][shape_idx].float()
                for part in parts[1:]:
                    right = right + part[shape_idx].float()
                if size == 2 or name in ("gather", "push"):
                    assert torch.equal(total, right.bfloat16()), (name, number)
                else:
                    torch.testing.assert_close(total, right.bfloat16(), rtol=2e-2, atol=2e-2)
