"""Sums over ranks, with threads as ranks: their bits, and the op that models call."""

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import ThreadMesh

from twofold.parallel.mesh import SingleRank
from twofold.parallel.shared_memory import Rendezvous
from twofold.parallel.sums import GatherSum, SharedMemorySum, agree, make_sum, summing

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_sum_is_rounded_once(size: int, dtype: torch.dtype) -> None:
    """Each rank has the bits of a sum in float32 in the order of ranks, of tensors that are contiguous or not."""
    xs = [torch.randn(3, 64, 5, generator=torch.Generator().manual_seed(rank)).to(dtype) for rank in range(size)]
    expected = xs[0].float()
    for x in xs[1:]:
        expected = expected + x.float()
    parts: list[Any] = [None] * size
    barrier = threading.Barrier(size, timeout=60)

    def run_rank(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        with summing(GatherSum(ThreadMesh(rank, parts, barrier))):
            strided = torch.ops.twofold.sum_over_ranks(xs[rank].transpose(0, 1))
            return torch.ops.twofold.sum_over_ranks(xs[rank]), strided

    with ThreadPoolExecutor(size) as pool:
        for dense, strided in pool.map(run_rank, range(size)):
            assert torch.equal(dense, expected.to(dtype))
            assert torch.equal(strided, expected.to(dtype).transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_that_take_along_what_follows(dtype: torch.dtype) -> None:
    """They give what separate operations give, on every rank; a sum may have another shape than the residual."""
    xs = [torch.randn(3, 8, generator=torch.Generator().manual_seed(rank)).to(dtype) for rank in range(2)]
    residual, weight, epsilon = torch.randn(1, 3, 8).to(dtype), torch.randn(8).to(dtype), 1e-2
    added = residual + (xs[0] + xs[1])
    norm = LlamaRMSNorm(8, epsilon).to(dtype)
    norm.weight.data = weight
    parts: list[Any] = [None] * 2
    barrier = threading.Barrier(2, timeout=60)

    def run_rank(rank: int) -> tuple[torch.Tensor, ...]:
        ops = torch.ops.twofold
        with summing(GatherSum(ThreadMesh(rank, parts, barrier))):
            number = torch.tensor(epsilon, dtype=torch.float64)
            return (
                ops.sum_add(xs[rank], residual),
                *ops.sum_add_norm(xs[rank], residual, weight, epsilon),
                *ops.sum_add_norm(xs[rank], residual, weight, number),
            )

    with ThreadPoolExecutor(2) as pool:
        for results in pool.map(run_rank, range(2)):
            for result, expected in zip(results, [added, *[added, norm(added)] * 2], strict=True):
                assert torch.equal(result, expected)


def test_one_rank_gets_a_new_tensor() -> None:
    x = torch.randn(2, 3)
    result = make_sum(SingleRank(), CPU, 0, -1)(x)
    assert torch.equal(result, x)
    assert result.data_ptr() != x.data_ptr()


def test_compiled_modules_call_the_sum_of_the_context() -> None:
    """A compiler sees one opaque op with the shape of its argument."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.twofold.sum_over_ranks(x * 2) + 1

    x = torch.randn(4, 8)
    with summing(lambda x: 3 * x):
        compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), 3 * (x * 2) + 1)


def test_ranks_agree_on_the_fastest_way() -> None:
    """Ranks measure different times. If each chose by its own, they would wait for each other in different kernels."""
    times = [torch.tensor([[1.0, 2.0], [3.0, 9.0]]), torch.tensor([[4.0, 2.5], [3.0, torch.inf]])]
    parts: list[Any] = [None] * 2
    barrier = threading.Barrier(2, timeout=60)
    with ThreadPoolExecutor(2) as pool:
        chosen = pool.map(
            lambda rank: agree(ThreadMesh(rank, parts, barrier), [64, 128], ["a", "b"], times[rank]), range(2)
        )
        assert list(chosen) == [((64, "b"), (128, "a"))] * 2


def test_waiting_for_a_lost_rank_leaves_the_cores_to_others() -> None:
    """A rank spins while it waits for its peers' parts. If a peer is lost, it waits until the engine ends it."""
    parts: list[Any] = [None] * 2
    barrier = threading.Barrier(2, timeout=60)
    file = os.memfd_create("sums")
    x = torch.randn(3, 8)

    def make_one(mesh: ThreadMesh) -> SharedMemorySum:
        return SharedMemorySum(mesh, Rendezvous(mesh, 256, file))

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda rank: make_one(ThreadMesh(rank, parts, barrier)), range(2))
        waiting = pool.submit(first, x)
        busy = time.process_time()
        time.sleep(0.5)
        busy, is_done = time.process_time() - busy, waiting.done()
        assert torch.equal(second(x), x + x)
        assert torch.equal(waiting.result(), x + x)
        assert not is_done
        assert busy < 0.1
    os.close(file)
