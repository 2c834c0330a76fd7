"""Pushing KV entries into the peers' buffers, with threads as ranks, and their memory in place of a GPU's."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed._symmetric_memory as symmetric_memory

sys.path.insert(0, str(Path(__file__).parents[1]))
from exchange_steps import MAX_NUM_ENTRIES, NUMS_OF_ENTRIES, WIDTHS, assert_equal, expected_caches, take_steps
from harness import ThreadMesh

from twofold.parallel.exchange import Exchange
from twofold.parallel.transport import Push

CPU = torch.device("cpu")


class Handle:
    """A buffer of every rank, as `rendezvous` returns it."""

    def __init__(self, buffers: list[torch.Tensor], barrier: threading.Barrier) -> None:
        self.buffers, self._barrier = buffers, barrier

    def barrier(self, channel: int) -> None:
        self._barrier.wait()

    def get_buffer(self, rank: int, shape: Any, dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
        numbers = torch.Size(shape).numel()
        return self.buffers[rank].view(dtype)[offset : offset + numbers].view(shape)


class Mesh(ThreadMesh):
    """Ranks that find each other's buffers."""

    def __init__(self, rank: int, parts: list[Any], barrier: threading.Barrier, buffers: list[Any]) -> None:
        super().__init__(rank, parts, barrier)
        self.group, self.buffers = self, buffers

    def rendezvous(self, buffer: torch.Tensor) -> Handle:
        self.buffers[self.rank] = buffer
        self._barrier.wait()
        handle = Handle(list(self.buffers), self._barrier)
        self._barrier.wait()
        return handle


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_ranks_get_all_rows(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 4 without a GPU: ranks out of step, two buffers in turn, steps and stacks that do not fit into them."""
    monkeypatch.setattr(symmetric_memory, "empty", lambda size, dtype, device: torch.zeros(size, dtype=dtype))
    monkeypatch.setattr(symmetric_memory, "rendezvous", lambda buffer, group: group.rendezvous(buffer))
    parts, buffers, barrier = [None] * size, [None] * size, threading.Barrier(size, timeout=60)

    def run_rank(rank: int) -> list[torch.Tensor]:
        mesh = Mesh(rank, parts, barrier, buffers)
        exchange = Exchange(mesh, Push(mesh, CPU, MAX_NUM_ENTRIES * max(WIDTHS) * 2))
        return take_steps(exchange, rank, size, CPU, lambda: time.sleep(0.002))

    with ThreadPoolExecutor(size) as threads:
        expected = expected_caches(size, NUMS_OF_ENTRIES)
        for rank, caches in enumerate(threads.map(run_rank, range(size))):
            assert_equal(caches, expected, rank)
