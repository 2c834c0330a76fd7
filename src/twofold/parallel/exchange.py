"""Making every rank's new keys and values present in every rank's cache, before anyone attends to them.

A token's *cache row* is all that a layer keeps of it: its keys and values of all heads (for MLA its latent), packed.
Only rows travel, and what one looks like is the business of the layer's cache (`worker/kv_cache.py`):

    my rows [N, W] ──all-gather──► everyone's rows [P * N, W] ──index copy──► pages [num_slots, W]

N is the largest number of tokens that any rank has in the step. Every rank pads its part of the step to N, so all ranks
send the same shape and a rank without tokens takes part like the others. Padding rows are written to the null block.

In a step of decodes each request is whole on one rank, and nobody attends to a row of another rank. Then each layer
writes its own rows, and those of all layers travel together when the last one is done.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from twofold.kv.cache import write_entries
from twofold.parallel.mesh import Mesh, ProcessMesh


@dataclass(slots=True)
class ExchangePlan:
    """Where a step's rows go; the same on every rank."""

    slots: torch.Tensor  # [P * N] gathered row -> slot of the cache
    defer_exchange: (
        bool  # no request has tokens on two ranks, and rows are so few that those of all layers fit together
    )


class Exchange(Protocol):
    """How rows get to the other ranks. Callers do not see when or how they travel."""

    num_bytes: int  # received from other ranks, since the start
    num_seconds: float  # that this rank did nothing else meanwhile, waits for slower ranks included; CPU only

    def begin(self, plan: ExchangePlan) -> None:
        """Starts a step."""

    def publish(self, rows: torch.Tensor, cache: torch.Tensor) -> None:
        """Starts writing rows [N, entry_width] into `cache` [num_slots, entry_width].

        Those of every rank that this one may attend to in this step are written.

        `rows` must stay as they are until `complete`.
        """

    def complete(self) -> None:
        """Work enqueued from now on sees what `publish` started to write."""

    def end(self, stacks: Sequence[torch.Tensor]) -> None:
        """Ends a step: work enqueued from now on sees the rows of all ranks and layers.

        A stack [layers, num_slots, entry_width] is the caches of all layers with rows of that width.
        """


class AllGatherExchange:
    """One packed all-gather a layer: the reference for every other exchange.

    On CUDA it runs on a stream of its own, beside whatever is enqueued between `publish` and `complete`.
    """

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        self.mesh = mesh
        self.num_bytes, self.num_seconds = 0, 0.0
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" and mesh.size > 1 else None
        self._is_busy = False  # the stream has work that nobody waits for yet

    def begin(self, plan: ExchangePlan) -> None:
        self._plan = plan

    def publish(self, rows: torch.Tensor, cache: torch.Tensor) -> None:
        slots = self._plan.slots
        if self._plan.defer_exchange or self.mesh.size == 1:
            write_entries(rows, slots[self.mesh.rank * len(rows) : (self.mesh.rank + 1) * len(rows)], cache)
        else:
            self._send(rows, slots, cache)

    def end(self, stacks: Sequence[torch.Tensor]) -> None:
        size = self.mesh.size
        if not self._plan.defer_exchange or size == 1:
            return
        for stack in stacks:
            num_layers, num_slots, entry_width = stack.shape
            first_slots = torch.arange(0, num_layers * num_slots, num_slots, device=stack.device)[:, None]
            slots = self._plan.slots.view(size, 1, -1) + first_slots  # [P, layers, N] gathered row -> slot of the stack
            cache = stack.view(-1, entry_width)
            self._send(cache.index_select(0, slots[self.mesh.rank].flatten()), slots.flatten(), cache)
            self.complete()

    def _send(self, rows: torch.Tensor, slots: torch.Tensor, cache: torch.Tensor) -> None:
        """Starts writing every rank's rows [n, entry_width] to slots [P * n] of `cache`."""
        self.num_bytes += rows.nbytes * (self.mesh.size - 1)
        if self._stream is None:
            start = time.perf_counter()
            self._gather(rows, slots, cache)
            self.num_seconds += time.perf_counter() - start
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        self._is_busy = True
        with torch.cuda.stream(self._stream):
            self._gather(rows, slots, cache)

    def _gather(self, rows: torch.Tensor, slots: torch.Tensor, cache: torch.Tensor) -> None:
        gathered = rows.new_empty(self.mesh.size * len(rows), rows.shape[1])
        self.mesh.all_gather(gathered, rows)
        write_entries(gathered, slots, cache)

    def complete(self) -> None:
        if self._stream is not None and self._is_busy:  # a graph cannot wait for a stream that it has not used
            torch.cuda.current_stream().wait_stream(self._stream)
            self._is_busy = False


class PushExchange(AllGatherExchange):
    """Each rank copies its rows straight into buffers of its peers, by the GPUs' copy engines.

    Copies take no multiprocessor from the projections that run meanwhile, as a collective's kernel does:

        publish   my rows ──copy──► my part of the buffer on every other rank, barrier, buffer ──► pages

    There are two buffers, used in turn. A rank that fills one for layer l + 2 has passed the barrier of layer l + 1,
    which its peers reached after they had emptied it of layer l. A step begins with a barrier and the first buffer: a
    CUDA graph uses those that it was recorded with, whichever the step before it used last.
    """

    def __init__(self, mesh: ProcessMesh, device: torch.device, max_num_bytes: int) -> None:
        """`max_num_bytes` of rows from all ranks travel together; more go through the all-gather."""
        super().__init__(mesh, device)
        import torch.distributed._symmetric_memory as symmetric_memory

        self._handles = []
        for _ in range(2):
            buffer = symmetric_memory.empty(max_num_bytes, dtype=torch.uint8, device=device)
            self._handles.append(symmetric_memory.rendezvous(buffer, mesh.group))
        self._max_num_bytes, self._num_published = max_num_bytes, 0

    def begin(self, plan: ExchangePlan) -> None:
        super().begin(plan)
        self._num_published = 0

    def _gather(self, rows: torch.Tensor, slots: torch.Tensor, cache: torch.Tensor) -> None:
        rank, size, num_rows = self.mesh.rank, self.mesh.size, len(rows)
        if rows.nbytes * size > self._max_num_bytes:
            super()._gather(rows, slots, cache)
            return
        handle = self._handles[self._num_published % 2]
        if self._num_published == 0:
            handle.barrier(channel=0)
        self._num_published += 1
        for distance in range(1, size):  # no two ranks copy to the same peer at the same time
            peer = (rank + distance) % size
            handle.get_buffer(peer, rows.shape, rows.dtype, rank * rows.numel()).copy_(rows)
        begin, end = rank * num_rows, (rank + 1) * num_rows
        write_entries(rows, slots[begin:end], cache)  # mine never go through the buffer
        handle.barrier(channel=0)
        gathered = handle.get_buffer(rank, (size * num_rows, rows.shape[1]), rows.dtype)
        for part in (slice(begin), slice(end, size * num_rows)):
            if len(gathered[part]):
                write_entries(gathered[part], slots[part], cache)


class SharedMemoryExchange(AllGatherExchange):
    """The same on a CPU: ranks of one machine write their rows into memory that all of them map.

    Two buffers, used in turn, for the same reason. A collective of one number a rank is the barrier.
    """

    def __init__(self, mesh: Mesh, device: torch.device, max_num_bytes: int, folder: str) -> None:
        super().__init__(mesh, device)
        storage: Any = torch.UntypedStorage.from_file(f"{folder}/rows", shared=True, nbytes=2 * max_num_bytes)
        memory = torch.empty(0, dtype=torch.uint8).set_(storage)
        self._buffers, self._turn = memory.chunk(2), 0
        self._flag, self._flags = torch.zeros(1), torch.zeros(mesh.size)

    def _gather(self, rows: torch.Tensor, slots: torch.Tensor, cache: torch.Tensor) -> None:
        size, num_bytes = self.mesh.size, rows.nbytes * self.mesh.size
        if num_bytes > len(self._buffers[0]):
            super()._gather(rows, slots, cache)
            return
        buffer, self._turn = self._buffers[self._turn], 1 - self._turn
        gathered = buffer[:num_bytes].view(rows.dtype).view(size * len(rows), rows.shape[1])
        gathered[self.mesh.rank * len(rows) : (self.mesh.rank + 1) * len(rows)] = rows
        self.mesh.all_gather(self._flags, self._flag)
        write_entries(gathered, slots, cache)


def make_exchange(name: str, mesh: Mesh, device: torch.device, max_num_bytes: int, folder: str) -> AllGatherExchange:
    """The exchange that `name` asks for; "auto" pushes where GPUs reach each other's memory.

    `max_num_bytes` of rows from all ranks travel together; `folder` is one that all ranks of the machine see.
    """
    if name == "all_gather" or not isinstance(mesh, ProcessMesh):
        return AllGatherExchange(mesh, device)
    if device.type == "cpu":
        return SharedMemoryExchange(mesh, device, max_num_bytes, folder)
    peers = (peer for peer in range(mesh.size) if peer != device.index)
    if name == "push" or all(torch.cuda.can_device_access_peer(device, peer) for peer in peers):
        return PushExchange(mesh, device, max_num_bytes)
    return AllGatherExchange(mesh, device)
