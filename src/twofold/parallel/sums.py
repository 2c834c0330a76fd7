"""Sums over ranks: every rank has a partial result, and every rank gets the sum of all, the same bits on each.

    x of rank 0 [..., W] ──┐
    x of rank 1 [..., W] ──┴─► sum [..., W] on every rank

A model calls the opaque op `torch.ops.twofold.sum_over_ranks`; `summing` says which `Sum` it uses. A sum that one rank
makes in another order than the others would let ranks disagree about a token.

In a compiled layer the op takes along what follows it (`models/transforms/compile.py`), which saves a kernel each:

    sum_add(x, residual)                         residual + sum
    sum_add_norm(x, residual, weight, epsilon)   residual + sum, and its norm
"""

import itertools
import logging
import platform
import statistics
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.distributed as dist

from twofold.parallel.mesh import Mesh, ProcessMesh
from twofold.parallel.shared_memory import Rendezvous

NUM_SHAPES = 256  # whose views of the shared memory are kept
PUSH_BYTES = 1 << 20  # of a rank's x that our own kernel has room for
LEAST_TIMED_BYTES = 4 << 10
NUM_TIMED_CALLS, NUM_TIMED_REPLAYS = 16, 10  # of one way and size when ranks start

Choices = tuple[tuple[int, str], ...]  # (bytes of x, the way to sum up to so many), ascending

logger = logging.getLogger(__name__)


class Sum(Protocol):
    """One way to add up what ranks have. All ranks call it in the same order with the same shapes."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., W] of this rank, contiguous or not → a new tensor [..., W], the sum over all ranks."""


class OneRank:
    """For one rank, whose part is the sum."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone(memory_format=torch.contiguous_format)


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
    """CPU ranks of one machine hand each other their parts through shared memory, and each adds all parts up."""

    def __init__(self, mesh: Mesh, rendezvous: Rendezvous) -> None:
        """Parts that have no room at the `rendezvous` are gathered."""
        self._gather, self._rendezvous = GatherSum(mesh), rendezvous

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.nbytes > self._rendezvous.max_num_bytes:
            return self._gather(x)
        return add_in_order(self._rendezvous(x))


class AllReduce:
    """PyTorch's collective: NCCL's all-reduce on GPUs. NCCL adds each number up once, and hands the result on."""

    def __init__(self, mesh: ProcessMesh) -> None:
        self._group = mesh.group

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self._group)
        return total


class SymmetricSum:
    """GPUs that reach each other's memory: for each size the way that was fastest when the ranks started.

        push        our kernel pushes x into every peer's buffer; each rank adds up all parts (`fused_sum.py`)
        one_shot    x is copied into my buffer; each rank reads all buffers, and adds them up
        two_shot    the same for a share of x; then each rank reads the shares of all ranks
        nccl        NCCL's all-reduce, also for all that the buffers have no room for

    All work is on the current stream. One buffer is enough for PyTorch's kernels (one_shot, two_shot): they begin and
    end with a barrier, so whatever follows on my stream may write my buffer. Which graph it is in does not matter.
    """

    def __init__(
        self, mesh: ProcessMesh, device: torch.device, max_num_bytes: int, choices: Choices | None = None
    ) -> None:
        """`choices` that an earlier start has measured, the same on all ranks; they are measured if there are none."""
        import torch.distributed._symmetric_memory as symmetric_memory

        from twofold.parallel.fused_sum import PushSum

        self._size, self._group_name = mesh.size, mesh.group.group_name
        self._max_num_bytes = -(-max_num_bytes // 16) * 16
        self._buffer = symmetric_memory.empty(self._max_num_bytes, dtype=torch.uint8, device=device)
        self._handle = symmetric_memory.rendezvous(self._buffer, mesh.group)
        self.push = PushSum(mesh, device, min(self._max_num_bytes, PUSH_BYTES))
        self._view = lru_cache(NUM_SHAPES)(self._make_view)
        self._ways: dict[str, Sum] = {
            "push": self.push, "one_shot": self._one_shot, "two_shot": self._two_shot, "nccl": AllReduce(mesh),
        }  # fmt: skip
        self.choices = self._measure(mesh, device) if choices is None else choices

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._ways[self._choose(x)](x)

    def pushes(self, x: torch.Tensor) -> bool:
        """Whether x goes through our own kernel, which can add a residual."""
        return self._choose(x) == "push"

    def _choose(self, x: torch.Tensor) -> str:
        way = next((way for num_bytes, way in self.choices if x.nbytes <= num_bytes), "nccl")
        return way if self._can(way, x) else "nccl"

    def _can(self, way: str, x: torch.Tensor) -> bool:
        if way == "push":
            return self.push.fits(x)
        is_kind = x.dtype in (torch.float32, torch.bfloat16) and x.nbytes % 16 == 0
        return way == "nccl" or (is_kind and x.nbytes <= self._max_num_bytes)

    def _one_shot(self, x: torch.Tensor) -> torch.Tensor:
        # one_shot_all_reduce_copy would save this copy. But its threads do not wait for each other between the copy
        # and the barrier, so a peer may read what is not there yet.
        mine = self._view(x.shape, x.dtype).copy_(x)
        total: torch.Tensor = torch.ops.symm_mem.one_shot_all_reduce(mine, "sum", self._group_name)
        return total

    def _two_shot(self, x: torch.Tensor) -> torch.Tensor:
        mine = self._view(x.shape, x.dtype).copy_(x)
        if self._size in (2, 4, 8):
            total = torch.empty_like(mine)
            torch.ops.symm_mem.two_shot_all_reduce_out(mine, "sum", self._group_name, total)
            return total
        torch.ops.symm_mem.two_shot_all_reduce_(mine, "sum", self._group_name)  # for any number of ranks
        return mine.clone()

    @torch.inference_mode(False)  # a view from inside may not be written to outside
    def _make_view(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """My buffer as a tensor."""
        return self._buffer[: shape.numel() * dtype.itemsize].view(dtype).view(shape)

    def _measure(self, mesh: Mesh, device: torch.device) -> Choices:
        """Times all ways at sizes that double, in CUDA graphs; the slowest rank counts."""
        sizes = [LEAST_TIMED_BYTES]
        while sizes[-1] < self._max_num_bytes:
            sizes.append(min(2 * sizes[-1], self._max_num_bytes))
        ways = list(self._ways)
        times = torch.full((len(sizes), len(ways)), torch.inf, device=device)
        for i, num_bytes in enumerate(sizes):
            x = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=device)
            for j, way in enumerate(ways):
                if self._can(way, x):
                    times[i, j] = time_in_graph(self._ways[way], x)
        torch.cuda.empty_cache()
        choices = agree(mesh, sizes, ways, times)
        logger.info("sums over ranks, up to so many bytes: %s", choices)
        return choices


def agree(mesh: Mesh, sizes: list[int], ways: list[str], times: torch.Tensor) -> Choices:
    """This rank's `times` [sizes, ways] → what all ranks choose; the slowest rank's time counts."""
    everyone = times.new_empty(mesh.size * len(sizes), len(ways))
    mesh.all_gather(everyone, times)
    fastest = everyone.view(mesh.size, len(sizes), len(ways)).amax(0).argmin(1).tolist()
    return tuple((num_bytes, ways[best]) for num_bytes, best in zip(sizes, fastest, strict=True))


def time_in_graph(way: Sum, x: torch.Tensor, num_calls: int = NUM_TIMED_CALLS) -> float:
    """Median microseconds of a call, when calls are replayed from a CUDA graph. All ranks call it together."""
    for _ in range(2):  # kernels are compiled outside of the capture
        way(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(num_calls):
            way(x)
    graph.replay()
    events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(NUM_TIMED_REPLAYS + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times: list[float] = [start.elapsed_time(end) for start, end in itertools.pairwise(events)]
    return statistics.median(times) / num_calls * 1e3


def make_sum(mesh: Mesh, device: torch.device, max_num_bytes: int, file: int) -> Sum:
    """The fastest sum for these ranks.

    `max_num_bytes` of a rank's x have room in memory that ranks share; larger ones go through a collective. `file` is a
    new file that all ranks have a descriptor of.
    """
    if mesh.size == 1:
        return OneRank()
    if not isinstance(mesh, ProcessMesh):
        return GatherSum(mesh)
    if device.type == "cuda":
        pairs = itertools.permutations(range(mesh.size), 2)
        if mesh.size <= torch.cuda.device_count() and all(torch.cuda.can_device_access_peer(*pair) for pair in pairs):
            return SymmetricSum(mesh, device, max_num_bytes)
        return AllReduce(mesh)
    if platform.machine() in ("x86_64", "AMD64"):  # see `Rendezvous`
        try:
            mesh.rendezvous = Rendezvous(mesh, max_num_bytes, file)
            return SharedMemorySum(mesh, mesh.rendezvous)
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


def _sum_add(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """x of this rank, as large as residual [..., W] → residual + the sum over all ranks [..., W].

    The sum is rounded before the residual is added, as it is where both are computed one after the other.
    """
    way: Sum = _current.sum
    x = x.reshape(residual.shape)
    if isinstance(way, SymmetricSum) and way.pushes(x):
        return way.push(x, residual)
    return residual + way(x)


def _sum_add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ what `_sum_add` gives, and its RMS norm times weight [W], rounded where Llama's modules round.

    (A compiler that fuses the norm's operations does not round between them.)
    """
    way: Sum = _current.sum
    x, epsilon = x.reshape(residual.shape), float(epsilon)
    if isinstance(way, SymmetricSum) and way.pushes(x) and way.push.fits_rows(x):
        return way.push.add_norm(x, residual, weight, epsilon)
    total = way(x)
    if total.is_cuda:
        from twofold.parallel import fused_sum  # Triton is on GPU machines only

        return fused_sum.add_norm(total, residual, weight, epsilon)
    added = residual + total
    wide = added.float()
    unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return added, weight * unit.to(added.dtype)


def _like_residual(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return x.new_empty(residual.shape)


_library = torch.library.Library("twofold", "FRAGMENT")


def _define(schema: str, op: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"twofold::{name}", fake, lib=_library)


_define("sum_over_ranks(Tensor x) -> Tensor", _sum_over_ranks, lambda x: x.new_empty(x.shape))
_define("sum_add(Tensor x, Tensor residual) -> Tensor", _sum_add, _like_residual)
for _overload, _kind in (("", "Tensor"), (".constant", "float")):
    _define(
        f"sum_add_norm{_overload}(Tensor x, Tensor residual, Tensor weight, {_kind} epsilon) -> (Tensor, Tensor)",
        _sum_add_norm,
        lambda x, residual, weight, epsilon: (_like_residual(x, residual), _like_residual(x, residual)),
    )
