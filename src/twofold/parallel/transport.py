"""How KV entries get from every rank to every rank's cache: by a collective, by pushes, or through shared memory.

    my entries [n, W] ──► everyone's entries [P * n, W] ──write──► kv_slots [num_slots, W]

Every rank sends the same shape, so a rank without tokens takes part like the others. `parallel/exchange.py` says when
they travel. Between nodes they travel once, in `AcrossNodes`; all other transports are for the ranks of one node.
"""

import logging
import time
from collections.abc import Sequence
from typing import Protocol

import torch

from twofold.kv.cache import Write, write_entries
from twofold.parallel.mesh import Axes, Mesh, ProcessMesh, gather
from twofold.parallel.shared_memory import share

logger = logging.getLogger(__name__)


class Transport(Protocol):
    """One way for entries to travel."""

    num_bytes: int  # received from other ranks of my node, since the start
    num_node_bytes: int  # the same from other nodes

    @property
    def num_seconds(self) -> float:
        """In which this rank did nothing else, waits for slower ranks included; CPU only."""

    def begin(self) -> None:
        """Starts a step."""

    def send(self, entries: torch.Tensor, writes: Sequence[Write], ready: "torch.cuda.Event | None" = None) -> None:
        """Starts writing every rank's entries [n, W], each of `writes` to P * n slots; CUDA: not before `ready`.

        `entries` must stay as they are until `complete`.
        """

    def complete(self) -> None:
        """Work enqueued from now on sees what `send` started to write."""


class OneRank:
    """For one rank, which only writes its own entries."""

    num_bytes, num_node_bytes, num_seconds = 0, 0, 0.0

    def begin(self) -> None:
        pass

    def send(self, entries: torch.Tensor, writes: Sequence[Write], ready: "torch.cuda.Event | None" = None) -> None:
        write_all(entries, writes)

    def complete(self) -> None:
        pass


class AllGather:
    """One packed all-gather: the reference for every other transport.

    On CUDA it runs on its own stream, in parallel with work that is enqueued between `send` and `complete`.
    """

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        self.mesh = mesh
        self.num_bytes, self.num_node_bytes, self.num_seconds = 0, 0, 0.0
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._is_busy = False  # the stream has work that no other stream waits for yet

    def begin(self) -> None:
        pass

    def send(self, entries: torch.Tensor, writes: Sequence[Write], ready: "torch.cuda.Event | None" = None) -> None:
        self.num_bytes += entries.nbytes * (self.mesh.size - 1)
        if self._stream is None:
            start = time.perf_counter()
            self._gather(entries, writes, ready)
            self.num_seconds += time.perf_counter() - start
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        self._is_busy = True
        with torch.cuda.stream(self._stream):
            self._gather(entries, writes, ready)

    def _gather(self, entries: torch.Tensor, writes: Sequence[Write], ready: "torch.cuda.Event | None") -> None:
        gathered = entries.new_empty(self.mesh.size * len(entries), entries.shape[1])
        self.mesh.all_gather(gathered, entries)
        self._wait_for(ready)
        write_all(gathered, writes)

    def _wait_for(self, ready: "torch.cuda.Event | None") -> None:
        if ready is not None:
            torch.cuda.current_stream().wait_event(ready)

    def complete(self) -> None:
        if self._stream is not None and self._is_busy:  # a graph cannot wait for a stream that it has not used
            torch.cuda.current_stream().wait_stream(self._stream)
            self._is_busy = False


class Push(AllGather):
    """Each rank copies its entries into buffers of its peers, by the GPUs' copy engines.

    A collective's kernel would take multiprocessors from the projections that run at the same time; copies take none:

        my entries ──copy──► my part of the buffer on every other rank, barrier, buffer ──write──► kv_slots

    There are two buffers, used in turn. A rank that fills one for layer l + 2 has passed the barrier of layer l + 1,
    which its peers reached after they had emptied it of layer l. A step begins with a barrier and the first buffer,
    because a CUDA graph always uses the buffers that it was captured with.
    """

    def __init__(self, mesh: ProcessMesh, device: torch.device, max_num_bytes: int) -> None:
        """`max_num_bytes` of entries from all ranks travel together; more go through the all-gather."""
        super().__init__(mesh, device)
        import torch.distributed._symmetric_memory as symmetric_memory

        self._handles = []
        for _ in range(2):
            buffer = symmetric_memory.empty(max_num_bytes, dtype=torch.uint8, device=device)
            self._handles.append(symmetric_memory.rendezvous(buffer, mesh.group))
        self._max_num_bytes, self._num_sent = max_num_bytes, 0

    def begin(self) -> None:
        self._num_sent = 0

    def _gather(self, entries: torch.Tensor, writes: Sequence[Write], ready: "torch.cuda.Event | None") -> None:
        rank, size = self.mesh.rank, self.mesh.size
        if entries.nbytes * size > self._max_num_bytes:
            super()._gather(entries, writes, ready)
            return
        handle = self._handles[self._num_sent % 2]
        if self._num_sent == 0:
            handle.barrier(channel=0)
        self._num_sent += 1
        for distance in range(1, size):  # no two ranks copy to the same peer at the same time
            peer = (rank + distance) % size
            handle.get_buffer(peer, entries.shape, entries.dtype, rank * entries.numel()).copy_(entries)
        if ready is not None:  # a peer's copies need not wait for it
            handle.barrier(channel=0)
            self._wait_for(ready)
        for write in writes:  # mine never go through the buffer
            write_mine(entries[:, write.columns], write.slots, write.kv_slots, rank)
        if ready is None:
            handle.barrier(channel=0)
        gathered = handle.get_buffer(rank, (size * len(entries), entries.shape[1]), entries.dtype)
        for write in writes:
            write_others(gathered[:, write.columns], write.slots, write.kv_slots, rank, size)


class SharedMemory(AllGather):
    """Ranks of one machine write their entries into memory that all of them map. For CPUs.

    Two buffers, used in turn, for the same reason as in `Push`. A collective of one number a rank is the barrier.
    """

    def __init__(self, mesh: Mesh, device: torch.device, max_num_bytes: int, file: int) -> None:
        """`max_num_bytes` of entries from all ranks travel together; more go through the all-gather.

        Raises:
            OSError: there is no room in memory. Every rank raises it.
        """
        super().__init__(mesh, device)
        self._buffers, self._turn = share(mesh, file, 2 * max_num_bytes).chunk(2), 0
        self._flag, self._flags = torch.zeros(1), torch.zeros(mesh.size)

    def _gather(self, entries: torch.Tensor, writes: Sequence[Write], ready: "torch.cuda.Event | None") -> None:
        size, num_bytes = self.mesh.size, entries.nbytes * self.mesh.size
        if num_bytes > len(self._buffers[0]):
            super()._gather(entries, writes, ready)
            return
        buffer, self._turn = self._buffers[self._turn], 1 - self._turn
        gathered = buffer[:num_bytes].view(entries.dtype).view(size * len(entries), entries.shape[1])
        gathered[self.mesh.rank * len(entries) : (self.mesh.rank + 1) * len(entries)] = entries
        self.mesh.all_gather(self._flags, self._flag)
        write_all(gathered, writes)


class AcrossNodes:
    """Entries travel twice: to the ranks at my place of every node, and from there within each node.

    So an entry crosses from one node to another once, whatever the number of ranks there:

        my entries [n, W] ──gather──► those of my place [N * n, W] ──within──► everyone's [G * N * n, W]

    N=2, G=2 example: rank 0's entry A goes to rank 2; then rank 0 hands it to rank 1, and rank 2 to rank 3.

    On CUDA the gather runs on a stream of its own, as the transport `within` a node does.
    """

    def __init__(self, node: Mesh, within: Transport, device: torch.device) -> None:
        self._node, self._within = node, within
        self.num_node_bytes, self._num_seconds = 0, 0.0
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._gathered: list[torch.Tensor] = []  # used by the stream of `within` until `complete`

    @property
    def num_bytes(self) -> int:
        return self._within.num_bytes

    @num_bytes.setter
    def num_bytes(self, value: int) -> None:
        self._within.num_bytes = value

    @property
    def num_seconds(self) -> float:
        return self._num_seconds + self._within.num_seconds

    def begin(self) -> None:
        self._within.begin()

    def send(self, entries: torch.Tensor, writes: Sequence[Write], ready: "torch.cuda.Event | None" = None) -> None:
        self.num_node_bytes += entries.nbytes * (self._node.size - 1)
        if self._stream is None:
            start = time.perf_counter()
            gathered = gather(self._node, entries).flatten(0, 1)
            self._num_seconds += time.perf_counter() - start
            self._within.send(gathered, writes, ready)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._gathered.append(gather(self._node, entries).flatten(0, 1))
            self._within.send(self._gathered[-1], writes, ready)

    def complete(self) -> None:
        self._within.complete()
        if self._stream is not None and self._gathered:  # a graph cannot wait for a stream that it has not used
            torch.cuda.current_stream().wait_stream(self._stream)
            self._gathered.clear()


def write_all(gathered: torch.Tensor, writes: Sequence[Write]) -> None:
    """Writes every rank's entries [P * n, W]."""
    for write in writes:
        write_entries(gathered[:, write.columns], write.slots, write.kv_slots)


def write_mine(entries: torch.Tensor, slots: torch.Tensor, kv_slots: torch.Tensor, rank: int) -> None:
    """Writes this rank's entries [n, W] to its part of `slots` [P * n]."""
    write_entries(entries, slots[rank * len(entries) : (rank + 1) * len(entries)], kv_slots)


def write_others(gathered: torch.Tensor, slots: torch.Tensor, kv_slots: torch.Tensor, rank: int, size: int) -> None:
    """Writes the other ranks' part of `gathered` [P * n, W] to `slots` [P * n]."""
    n = len(gathered) // size
    for part in (slice(rank * n), slice((rank + 1) * n, size * n)):
        if len(gathered[part]):
            write_entries(gathered[part], slots[part], kv_slots)


def make_transport(name: str, axes: Axes, device: torch.device, max_num_bytes: int, file: int) -> Transport:
    """The transport that the engine argument `exchange` names; "auto" pushes where GPUs reach each other's memory.

    `max_num_bytes` of entries from all ranks travel together; `file` is one that all ranks of a node have a descriptor
    of.
    """
    within = _within_node(name, axes.gpu, device, max_num_bytes, file)
    return within if axes.node.size == 1 else AcrossNodes(axes.node, within, device)


def _within_node(name: str, mesh: Mesh, device: torch.device, max_num_bytes: int, file: int) -> Transport:
    if mesh.size == 1:
        return OneRank()
    if name == "all_gather" or not isinstance(mesh, ProcessMesh):
        return AllGather(mesh, device)
    if device.type == "cpu":
        try:
            return SharedMemory(mesh, device, max_num_bytes, file)
        except OSError as error:
            logger.warning("KV entries travel by all-gather, since ranks cannot share memory for them: %s", error)
            return AllGather(mesh, device)
    peers = (peer for peer in range(mesh.size) if peer != device.index)
    if name == "push" or all(torch.cuda.can_device_access_peer(device, peer) for peer in peers):
        return Push(mesh, device, max_num_bytes)
    return AllGather(mesh, device)
