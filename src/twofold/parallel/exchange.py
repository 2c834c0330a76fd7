"""When every rank's new KV entries travel to every rank's cache: layer by layer, or all at the step's end.

    by layer   publish ──send──► every cache, before this layer's attention
    deferred   publish ──write──► my cache; end ──send──► every cache, the entries of all layers together

Entries must travel by layer where a request has tokens on two ranks. In a step of decodes no rank attends to another
rank's new entries, so they may travel once. `parallel/transport.py` says how they travel.

In a step by heads a rank has its part of every entry, one range of its columns. A cache of slots of W numbers is then
seen as one of P times as many slots of W / P numbers, and parts travel as entries do:

    entries      | slot 0               | slot 1               |
    parts        | 0: rank 0 | 1: rank 1 | 2: rank 0 | 3: rank 1 |        part of slot s on rank r: s * P + r

A layer whose heads do not divide has whole entries on every rank; they need not travel.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from twofold.kv.cache import Write, write_entries
from twofold.parallel.mesh import Mesh
from twofold.parallel.transport import Transport


@dataclass(slots=True)
class ExchangePlan:
    """Where a step's KV entries go; the same on every rank."""

    slots: torch.Tensor  # [P * N] gathered entry -> slot of the cache
    defer_exchange: bool  # whether the entries of all layers may travel together when the step ends
    by_heads: bool  # gathered entries are parts of entries


class Exchange:
    """Brings entries to all caches in time. Callers do not see when or how they travel."""

    def __init__(self, mesh: Mesh, transport: Transport) -> None:
        self.mesh, self.transport = mesh, transport

    def begin(self, plan: ExchangePlan) -> None:
        """Starts a step."""
        self._slots, self._parts = plan.slots.view(self.mesh.size, -1), None
        if plan.by_heads and self.mesh.size > 1:
            ranks = torch.arange(self.mesh.size, device=plan.slots.device)
            self._parts = self._slots * self.mesh.size + ranks[:, None]
        self._by_heads = plan.by_heads
        self._is_deferred = plan.defer_exchange and self.mesh.size > 1
        self.transport.begin()

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
        write_entries(entries, slots[self.mesh.rank], kv_slots.view(-1, entries.shape[1]))

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
            slots = write.slots.view(self.mesh.size, -1)[self.mesh.rank]
            write_entries(entries[:, write.columns], slots, write.kv_slots)

    def complete(self) -> None:
        """Work enqueued from now on sees what `publish` started to write."""
        self.transport.complete()

    def end(self, stacks: Sequence[torch.Tensor]) -> None:
        """Ends a step: work enqueued from now on sees the entries of all ranks and layers.

        A stack [layers, num_slots, entry_width] is the caches of all layers with entries of that width. By heads they
        are those of which ranks have parts.
        """
        if not self._is_deferred:
            return
        for stack in stacks:
            num_layers, num_slots, entry_width = stack.shape
            slots = self._slots
            if self._parts is not None:
                slots, num_slots, entry_width = self._parts, num_slots * self.mesh.size, entry_width // self.mesh.size
            first_slots = torch.arange(0, num_layers * num_slots, num_slots, device=stack.device)[:, None]
            slots = slots[:, None] + first_slots  # [P, layers, N] gathered entry -> slot of the stack
            kv_slots = stack.view(-1, entry_width)
            entries = kv_slots.index_select(0, slots[self.mesh.rank].flatten())
            self.transport.send(entries, [Write(slots.flatten(), kv_slots)])
            self.transport.complete()
