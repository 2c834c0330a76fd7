"""When every rank's new KV entries travel to every rank's cache: layer by layer, or all at the step's end.

    by layer   publish ──send──► every cache, before this layer's attention
    deferred   publish ──write──► my cache; end ──send──► every cache, the entries of all layers together

Entries must travel by layer where a request has tokens on two ranks. In a step of decodes no rank attends to another
rank's new entries, so they may travel once. `parallel/transport.py` says how they travel.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from twofold.parallel.mesh import Mesh
from twofold.parallel.transport import Transport, write_mine


@dataclass(slots=True)
class ExchangePlan:
    """Where a step's KV entries go; the same on every rank."""

    slots: torch.Tensor  # [P * N] gathered entry -> slot of the cache
    defer_exchange: bool  # whether the entries of all layers may travel together when the step ends


class Exchange:
    """Brings entries to all caches in time. Callers do not see when or how they travel."""

    def __init__(self, mesh: Mesh, transport: Transport) -> None:
        self.mesh, self.transport = mesh, transport

    def begin(self, plan: ExchangePlan) -> None:
        """Starts a step."""
        self._slots = plan.slots
        self._is_deferred = plan.defer_exchange and self.mesh.size > 1
        self.transport.begin()

    def publish(self, entries: torch.Tensor, kv_slots: torch.Tensor) -> None:
        """Starts writing entries [N, entry_width] into a layer's cache [num_slots, entry_width]: those of all ranks, or
        only mine in a deferred exchange.

        `entries` must stay as they are until `complete`.
        """
        if self._is_deferred:
            write_mine(entries, self._slots, kv_slots, self.mesh.rank)
        else:
            self.transport.send(entries, self._slots, kv_slots)

    def complete(self) -> None:
        """Work enqueued from now on sees what `publish` started to write."""
        self.transport.complete()

    def end(self, stacks: Sequence[torch.Tensor]) -> None:
        """Ends a step: work enqueued from now on sees the entries of all ranks and layers.

        A stack [layers, num_slots, entry_width] is the caches of all layers with entries of that width.
        """
        if not self._is_deferred:
            return
        for stack in stacks:
            num_layers, num_slots, entry_width = stack.shape
            first_slots = torch.arange(0, num_layers * num_slots, num_slots, device=stack.device)[:, None]
            # [P, layers, N] gathered entry -> slot of the stack
            slots = self._slots.view(self.mesh.size, 1, -1) + first_slots
            kv_slots = stack.view(-1, entry_width)
            entries = kv_slots.index_select(0, slots[self.mesh.rank].flatten())
            self.transport.send(entries, slots.flatten(), kv_slots)
            self.transport.complete()
