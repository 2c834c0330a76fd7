"""When every rank's new KV entries travel to every rank's cache: layer by layer, or all at the step's end.

    by layer   publish ──send──► every cache, before this layer's attention
    deferred   publish ──write──► my cache; end ──send──► every cache, the entries of all layers together

Entries must travel by layer where a request has tokens on two ranks. In a step of decodes no rank attends to another
rank's new entries, so they may travel once. `parallel/transport.py` says how they travel.

In a step by heads each of the G ranks of a node has its part of an entry, one range of its columns. A cache of slots of
W numbers is then seen as one of G times as many slots of W / G numbers, and parts travel as entries do:

    entries      | slot 0               | slot 1               |
    parts        | 0: rank 0 | 1: rank 1 | 2: rank 0 | 3: rank 1 |        part of slot s on rank r: s * G + r

A layer whose heads do not divide has whole entries on every rank; they need not travel within the node.

Gathered entries come in the order in which a transport brings them: by place on a node, then by node. With N nodes of G
ranks those of rank (node, place) are part place * N + node; with one node that is the rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from twofold.kv.cache import Write, write_entries
from twofold.parallel.mesh import Mesh, SingleRank
from twofold.parallel.transport import Transport

ONE_NODE = SingleRank()


@dataclass(slots=True)
class ExchangePlan:
    """Where a step's KV entries go; the same on every rank."""

    slots: torch.Tensor  # [P * n] gathered entry -> slot of the cache
    defer_exchange: bool  # whether the entries of all layers may travel together when the step ends
    by_heads: bool  # gathered entries are parts of entries


class Exchange:
    """Brings entries to all caches in time. Callers do not see when or how they travel."""

    def __init__(self, mesh: Mesh, transport: Transport, node: Mesh = ONE_NODE) -> None:
        """`mesh`: the ranks of my node. `node`: those at my place of every node."""
        self.mesh, self.transport = mesh, transport
        self._num_nodes, self._num_ranks = node.size, node.size * mesh.size
        self._mine = mesh.rank * node.size + node.rank  # my part of gathered entries

    def begin(self, plan: ExchangePlan) -> None:
        """Starts a step."""
        self._slots, self._parts = plan.slots.view(self._num_ranks, -1), None
        if plan.by_heads and self.mesh.size > 1:
            places = torch.arange(self._num_ranks, device=plan.slots.device) // self._num_nodes
            self._parts = self._slots * self.mesh.size + places[:, None]
        self._by_heads = plan.by_heads
        self._is_deferred = plan.defer_exchange and self._num_ranks > 1
        self.transport.begin()

    def own_slots(self) -> torch.Tensor | None:
        """[n] where this rank's entries go, if none of them travels before the step ends, and they are whole."""
        is_alone = self._num_ranks == 1 or (self._is_deferred and not self._by_heads)
        return self._slots[self._mine] if is_alone else None

    def publish(self, entries: torch.Tensor, kv_slots: torch.Tensor) -> None:
        """Starts writing entries [N, entry_width] into a layer's cache [num_slots, entry_width]: those of all ranks, or
        only mine in a deferred exchange. By heads entries may be parts, narrower than `kv_slots`.

        `entries` must stay as they are until `complete`.
        """
        if not self._is_deferred:
            self.transport.send(entries, [Write(self._slots.flatten(), kv_slots)])
            return
        is_part = entries.shape[1] < kv_slots.shape[1]
        slots = self._parts if is_part else self._slots
        assert slots is not None, "parts of entries are made in steps by heads only"
        write_entries(entries, slots[self._mine], kv_slots.view(-1, entries.shape[1]))

    def publish_shares(self, entries: torch.Tensor, writes: Sequence[Write], ready: "torch.cuda.Event | None") -> None:
        """The same where each rank keeps a share of the cache, by `writes` of whole entries, each to P * N slots.

        Nothing is written before `ready`. In steps by heads every rank has made whole entries of all tokens itself.
        """
        if not self._by_heads:
            self.transport.send(entries, writes, ready)
            return
        if ready is not None:
            torch.cuda.current_stream().wait_event(ready)
        for write in writes:
            slots = write.slots.view(self._num_ranks, -1)[self._mine]
            write_entries(entries[:, write.columns], slots, write.kv_slots)

    def complete(self) -> None:
        """Work enqueued from now on sees what `publish` started to write."""
        self.transport.complete()

    def end(self, stacks: Sequence[torch.Tensor], whole_stacks: Sequence[torch.Tensor] = ()) -> None:
        """Ends a step: work enqueued from now on sees the entries of all ranks and layers.

        A stack [layers, num_slots, entry_width] is the caches of all layers with entries of that width. By heads ranks
        have parts of the entries in `stacks`. Those in `whole_stacks` all ranks of a node have whole.
        """
        if not self._is_deferred:
            return
        for stack in stacks:
            if self._parts is None:
                self._send(stack, self._slots)
            else:
                self._send(stack.view(len(stack), -1, stack.shape[2] // self.mesh.size), self._parts)
        if self._num_nodes > 1:
            for stack in whole_stacks:
                self._send(stack, self._dealt_slots())

    def _send(self, stack: torch.Tensor, slots: torch.Tensor) -> None:
        """Brings entries of all layers to all ranks; slots [P, n] of a layer, each rank has its own entries there."""
        num_layers, num_slots, width = stack.shape
        first_slots = torch.arange(0, num_layers * num_slots, num_slots, device=stack.device)[:, None]
        slots = slots[:, None] + first_slots  # [P, layers, n] gathered entry -> slot of the stack
        kv_slots = stack.view(-1, width)
        entries = kv_slots.index_select(0, slots[self._mine].flatten())
        self.transport.send(entries, [Write(slots.flatten(), kv_slots)])
        self.transport.complete()

    def _dealt_slots(self) -> torch.Tensor:
        """[P, n / G]: each rank of a node has an equal share of the node's tokens, so that none travels twice."""
        num_places = self.mesh.size
        of_nodes = self._slots.view(num_places, -1, self._slots.shape[1])[0]  # [N, n]
        size = -(-of_nodes.shape[1] // num_places)
        padded = F.pad(of_nodes, (0, num_places * size - of_nodes.shape[1]))
        return padded.view(-1, num_places, size).transpose(0, 1).flatten(0, 1)
