"""Making every rank's new keys and values present in every rank's cache, before anyone attends.

A token's *cache row* is all that a layer keeps of it: its keys and values of all heads (for MLA its latent), packed.
Only rows travel, and what one looks like is the business of the layer's cache (`worker/kv_cache.py`):

    my rows [N, W] ──all-gather──► everyone's rows [P * N, W] ──index copy──► pages [num_slots, W]

N is the largest number of tokens that any rank has in the step. Every rank pads its part of the step to N, so all ranks
send the same shape and a rank without tokens takes part like the others. Padding rows are written to the null block.
"""

import time
from dataclasses import dataclass
from typing import Protocol

import torch

from twofold.parallel.mesh import Mesh


@dataclass(slots=True)
class ExchangePlan:
    """Where a step's rows go; the same on every rank."""

    slots: torch.Tensor  # [P * N] gathered row -> slot of the cache


class Exchange(Protocol):
    """How rows get to the other ranks. Callers do not see when or how they travel."""

    num_bytes: int  # received from other ranks, since the start
    num_seconds: float  # that this rank did nothing else meanwhile, waits for slower ranks included; CPU only

    def begin(self, plan: ExchangePlan) -> None:
        """Starts a step."""

    def publish(self, rows: torch.Tensor, cache: torch.Tensor) -> None:
        """Starts writing every rank's rows [N, row_width] into `cache` [num_slots, row_width].

        `rows` must stay as they are until `complete`.
        """

    def complete(self) -> None:
        """Work enqueued from now on sees all rows that were published."""


class AllGatherExchange:
    """One packed all-gather a layer: the reference for every other exchange.

    On CUDA it runs on a stream of its own, beside whatever is enqueued between `publish` and `complete`.
    """

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        self.mesh = mesh
        self.num_bytes = 0
        self.num_seconds = 0.0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and mesh.size > 1 else None

    def begin(self, plan: ExchangePlan) -> None:
        self._plan = plan

    def publish(self, rows: torch.Tensor, cache: torch.Tensor) -> None:
        if self.mesh.size == 1:
            self._write(rows, cache)
            return
        self.num_bytes += rows.nbytes * (self.mesh.size - 1)
        if self._stream is None:
            start = time.perf_counter()
            self._gather(rows, cache)
            self.num_seconds += time.perf_counter() - start
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._gather(rows, cache)

    def _gather(self, rows: torch.Tensor, cache: torch.Tensor) -> None:
        gathered = rows.new_empty(self.mesh.size * len(rows), rows.shape[1])
        self.mesh.all_gather(gathered, rows)
        self._write(gathered, cache)

    def _write(self, rows: torch.Tensor, cache: torch.Tensor) -> None:
        if rows.device.type == "cuda":
            from twofold.parallel.scatter import scatter_rows  # Triton is on GPU machines only

            scatter_rows(rows, self._plan.slots, cache)
        else:
            cache.index_copy_(0, self._plan.slots, rows)

    def complete(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
