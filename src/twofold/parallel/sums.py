"""Sums over ranks: every rank has a partial result, and every rank gets the sum of all, the same bits on each.

    x of rank 0 [..., W] ──┐
    x of rank 1 [..., W] ──┴─► sum [..., W] on every rank

A model calls the opaque op `torch.ops.twofold.sum_over_ranks`; `summing` says which `Sum` it uses. A sum that one rank
makes in another order than the others would let ranks disagree about a token.
"""

import logging
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Protocol

import torch

from twofold.parallel.mesh import Mesh, ProcessMesh
from twofold.parallel.shared_memory import share

CACHE_LINE = 64  # bytes
NUM_LOOKS = 100  # at a peer's flag, some microseconds, before others may have this core
YIELD_SECONDS = 2e-3  # that a rank looks again at once; then it sleeps between looks
SLEEP_SECONDS = 50e-6
NUM_SHAPES = 256  # whose views of the shared memory are kept

logger = logging.getLogger(__name__)


class Sum(Protocol):
    """One way to add up what ranks have. All ranks call it in the same order with the same shapes."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., W] of this rank, contiguous or not → a new tensor [..., W], the sum over all ranks."""


class OneRank:
    """For one rank, whose part is the sum."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


class GatherSum:
    """An all-gather, then a sum in float32 in the order of ranks, rounded once: the reference for every other one."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gathered = x.new_empty(self.mesh.size, x.numel())
        self.mesh.all_gather(gathered.flatten(), x.flatten())
        return add_in_order(gathered.unbind()).view(x.shape)


def add_in_order(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The sum of one part a rank, at least two; in float32, rounded once to the parts' type."""
    if len(parts) == 2:
        return parts[0] + parts[1]  # kernels add in float32 and round their result
    total = parts[0].float() + parts[1]
    for part in parts[2:]:
        total += part
    return total.to(parts[0].dtype)


class SharedMemorySum:
    """CPU ranks of one machine write their parts into memory that all of them map, and each adds all parts up.

        x ──copy──► my part of the buffer, my flag = number of this sum, wait for all flags, parts ──add──► sum

    A flag has a cache line of its own, and only its rank writes it. There are two buffers, used in turn: a rank that
    writes sum n + 2 has seen all flags of sum n + 1, which its peers set after they had read all parts of sum n.

    Nothing here orders memory but the processor. x86 does: it keeps a core's stores in order, its loads in order, and
    loads before later stores, so whoever sees a flag sees the part, and whoever sets one has read what it read before.
    """

    def __init__(self, mesh: Mesh, max_num_bytes: int, file: int) -> None:
        """`max_num_bytes` of a rank's x have room; larger ones are gathered. `file` is new.

        Raises:
            OSError: there is no room in memory. Every rank raises it.
        """
        self._gather = GatherSum(mesh)
        self._rank, self._size = mesh.rank, mesh.size
        part_bytes = -(-max_num_bytes // CACHE_LINE) * CACHE_LINE
        memory = share(mesh, file, mesh.size * (CACHE_LINE + 2 * part_bytes))
        flags, parts = memory.split([mesh.size * CACHE_LINE, 2 * mesh.size * part_bytes])
        self._flags = memoryview(flags.numpy()).cast("Q")  # looks cost a tenth of a tensor's
        self._parts = parts.view(2, mesh.size, part_bytes)
        self._max_num_bytes, self._num_sums = max_num_bytes, 0
        self._others = [rank * (CACHE_LINE // 8) for rank in range(mesh.size) if rank != mesh.rank]
        self._views = lru_cache(NUM_SHAPES)(self._make_views)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.nbytes > self._max_num_bytes:
            return self._gather(x)
        self._num_sums += 1
        parts = self._views(self._num_sums % 2, x.shape, x.dtype)
        parts[self._rank].copy_(x)
        self._flags[self._rank * (CACHE_LINE // 8)] = self._num_sums
        for flag in self._others:
            self._wait(flag)
        return add_in_order(parts)

    def _make_views(self, turn: int, shape: torch.Size, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Every rank's part [*shape] of a buffer."""
        num_bytes = shape.numel() * dtype.itemsize
        return tuple(part[:num_bytes].view(dtype).view(shape) for part in self._parts[turn])

    def _wait(self, flag: int) -> None:
        """Waits until a rank has written its part. If that rank was lost, the engine ends this one."""
        flags, number = self._flags, self._num_sums
        for _ in range(NUM_LOOKS):
            if flags[flag] >= number:
                return
        sleepless = time.monotonic() + YIELD_SECONDS
        while flags[flag] < number:
            if time.monotonic() < sleepless:
                os.sched_yield()
            else:
                time.sleep(SLEEP_SECONDS)


def make_sum(mesh: Mesh, device: torch.device, max_num_bytes: int, file: int) -> Sum:
    """The fastest sum for these ranks.

    `max_num_bytes` of a rank's x have room in memory that ranks share; larger ones go through a collective. `file` is a
    new file that all ranks have a descriptor of.
    """
    if mesh.size == 1:
        return OneRank()
    if device.type == "cpu" and isinstance(mesh, ProcessMesh) and platform.machine() in ("x86_64", "AMD64"):
        try:
            return SharedMemorySum(mesh, max_num_bytes, file)
        except OSError as error:
            logger.warning("sums are gathered, since ranks cannot share memory for them: %s", error)
    return GatherSum(mesh)


_current = threading.local()


@contextmanager
def summing(sum: Sum | None) -> Iterator[None]:
    """Makes `sum` the one that a model's modules use, in this thread. By tokens there is none."""
    _current.sum = sum
    try:
        yield
    finally:
        del _current.sum


def _sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """x [..., W] of this rank → the sum over all ranks [..., W]."""
    result: torch.Tensor = _current.sum(x)
    return result


_library = torch.library.Library("twofold", "FRAGMENT")
_library.define("sum_over_ranks(Tensor x) -> Tensor")
_library.impl("sum_over_ranks", _sum_over_ranks, "CompositeExplicitAutograd")
torch.library.register_fake("twofold::sum_over_ranks", lambda x: x.new_empty(x.shape), lib=_library)
