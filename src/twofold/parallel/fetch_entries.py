"""Bring whole KV entries to a rank that computes its rows by tokens, where each rank keeps a share of the cache.

A *workspace* is a small paged cache of the blocks that my rows attend to. What earlier steps have computed is fetched
from the peers' memory, and what this step computes arrives by the exchange:

    layer l      publish ──► entries of this step ──► my share, workspace l % 2     attend
    layer l + 1      peers' shares ──fetch──► workspace (l + 1) % 2

There are two workspaces, used in turn: one is fetched while the other is read. On GPUs the copy engines fetch, on a
stream of their own, so no multiprocessor waits. Of a layer that is divided by heads my own heads stay where they are:

    by heads     | my cache | workspace: heads of a peer | workspace: heads of a peer |   attention runs on each of them
    by blocks    | workspace: whole entries, of my blocks too |

Ranks read each other's memory without asking. A step that fetches, and the one after it, begin with a barrier. So what
is read was written before, and is not overwritten too early: within a step no rank writes what another one fetches.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from twofold.kv.cache import Write, copy_blocks
from twofold.kv.sharded import LayerShare, ShardedKVCache
from twofold.parallel.peer_memory import PeerMemory

MAX_RUNS = 64  # of neighbouring blocks that are copied one by one; more are gathered by one kernel


@dataclass(slots=True)
class Source:
    """Blocks of one rank's share that go to consecutive blocks of a workspace."""

    rank: int
    first: int  # block of the workspace
    places_np: NDArray[np.int64]
    places: torch.Tensor  # the same on the device
    runs: list[tuple[int, int, int]] = field(init=False)  # neighbours: first place, block of the workspace, number

    def __post_init__(self) -> None:
        cuts = (np.flatnonzero(np.diff(self.places_np) != 1) + 1).tolist()
        bounds = itertools.pairwise([0, *cuts, len(self.places_np)])
        self.runs = [(int(self.places_np[start]), self.first + start, end - start) for start, end in bounds]


@dataclass(slots=True)
class Placement:
    """Where this rank's workspace has the blocks of its rows; block 0 is its null block."""

    num_blocks: int  # with the null block
    sources: list[Source]
    block_tables_np: NDArray[np.int32]  # [V, B]
    block_tables: torch.Tensor  # [V', B]
    slots: torch.Tensor  # [P * N] gathered entry -> slot of the workspace; 0 where no row of mine needs it
    my_slots: torch.Tensor  # [P * N] gathered entry -> slot of my share; 0 where another rank keeps it


@dataclass(slots=True)
class FetchPlan:
    """What a rank fetches in a step."""

    fetches: bool  # whether any rank does
    placements: dict[tuple[bool, int | None], Placement]  # of layers divided by heads or not, with which window


class EntryFetch:
    """A rank's two workspaces. `begin` a step; then for each layer `writes` and `ready`, `caches`, and `finish`."""

    def __init__(self, cache: ShardedKVCache, num_blocks: int, memory: PeerMemory) -> None:
        """`num_blocks`: of a workspace, with its null block."""
        self.cache, self.num_blocks, self._memory = cache, num_blocks, memory
        device, dtype = cache.blocks[0].device, cache.blocks[0].dtype
        numbers = max(_workspace_numbers(share, num_blocks, cache.block_size) for share in cache.shares)
        self._buffers = [torch.zeros(numbers, dtype=dtype, device=device) for _ in range(2)]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._must_wait = False  # this step fetches: the next one begins with a barrier
        self._plan: FetchPlan | None = None
        self._turns: dict[int, int] = {}  # layer that needs a workspace in this step -> its place among them
        self._layers: Sequence[int] = ()
        self._ready: dict[int, torch.cuda.Event] = {}  # layer -> when its workspace has what is fetched
        self.num_bytes = 0  # fetched from other ranks, since the start

    def begin(self, plan: FetchPlan | None, layers: Sequence[int]) -> None:
        """Starts a step on every rank, in which `layers` need a workspace. The plan is None where none does."""
        fetches = plan is not None and plan.fetches and bool(layers)
        if fetches or self._must_wait:
            self._memory.barrier()
        self._must_wait, self._plan = fetches, plan
        self._layers, self._turns = layers, {layer: turn for turn, layer in enumerate(layers)}
        self._ready.clear()
        for layer in layers[:2]:
            self._fetch(layer)

    def serves(self, layer: int) -> bool:
        """Whether the layer needs a workspace in this step. If not, its rows attend to this rank's share."""
        return layer in self._turns

    def writes(self, layer: int) -> list[Write]:
        """Where every rank's new entries of the layer go: into my share, and into the workspace."""
        share, placement = self.cache.shares[layer], self.placement(layer)
        mine = Write(placement.my_slots, self.cache.slots[layer], share.columns(self.cache.rank))
        parts = zip(self._ranks(share), self._workspaces(layer), strict=True)
        return [mine] + [Write(placement.slots, part.flatten(0, 1), share.columns(rank)) for rank, part in parts]

    def ready(self, layer: int) -> torch.cuda.Event | None:
        """After it new entries may be written into the workspace: a block may have old and new ones."""
        return self._ready.get(layer)

    def caches(self, layer: int) -> list[torch.Tensor]:
        """By heads the caches of each rank's heads, mine at my place; by blocks the only one, of whole entries."""
        caches = self._workspaces(layer)
        if self.cache.shares[layer].by_heads:
            caches.insert(self.cache.rank, self.cache.blocks[layer])
        return caches

    def finish(self, layer: int) -> None:
        """The layer's attention is enqueued: its workspace is free for the layer after the next."""
        turn = self._turns[layer] + 2
        if turn < len(self._layers):
            self._fetch(self._layers[turn])

    def _fetch(self, layer: int) -> None:
        placement = self.placement(layer)
        if not placement.sources:
            return
        if self._stream is None:
            self._copy(layer, placement)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._copy(layer, placement)
        self._ready[layer] = self._stream.record_event()

    def _copy(self, layer: int, placement: Placement) -> None:
        share = self.cache.shares[layer]
        workspace_of = dict(zip(self._ranks(share), self._workspaces(layer), strict=True))
        for source in placement.sources:
            theirs = self.cache.everyones[source.rank][layer]
            workspace = workspace_of[source.rank if share.by_heads else 0]
            if source.rank != self.cache.rank:
                self.num_bytes += len(source.places_np) * theirs[0].nbytes
            if theirs.is_cuda and len(source.runs) <= MAX_RUNS:
                for place, first, count in source.runs:
                    workspace[first : first + count].copy_(theirs[place : place + count])
            else:
                copy_blocks(theirs, source.places, workspace[source.first : source.first + len(source.places_np)])

    def placement(self, layer: int) -> Placement:
        """Where the workspace has the blocks of my rows."""
        assert self._plan is not None, "no layer of this step has a workspace"
        share = self.cache.shares[layer]
        placement = self._plan.placements[share.by_heads, share.window]
        assert placement.num_blocks <= self.num_blocks, (placement.num_blocks, self.num_blocks)
        return placement

    def _ranks(self, share: LayerShare) -> list[int]:
        """Whose heads the workspace has; by blocks it is one for all."""
        return [rank for rank in range(share.num_ranks) if rank != self.cache.rank] if share.by_heads else [0]

    def _workspaces(self, layer: int) -> list[torch.Tensor]:
        """[num_blocks, block_size, width] of each of `_ranks`."""
        share, buffer = self.cache.shares[layer], self._buffers[self._turns[layer] % 2]
        numbers = self.num_blocks * self.cache.block_size * share.width
        shape = (self.num_blocks, self.cache.block_size, share.width)
        return [buffer[i * numbers : (i + 1) * numbers].view(shape) for i in range(len(self._ranks(share)))]


def workspace_bytes(shares: Sequence[LayerShare], num_blocks: int, block_size: int, dtype: torch.dtype) -> int:
    """Memory of the two workspaces of a rank."""
    return 2 * max(_workspace_numbers(share, num_blocks, block_size) for share in shares) * dtype.itemsize


def _workspace_numbers(share: LayerShare, num_blocks: int, block_size: int) -> int:
    return num_blocks * block_size * share.width * (share.num_ranks - 1 if share.by_heads else 1)
