"""Making every rank's new keys and values present in every rank's cache, before anyone attends.

A token's *cache row* is all that a layer keeps of it: its keys and values of all heads (for MLA its latent), packed.
Only rows travel, and what one looks like is the business of the layer's cache (`worker/kv_cache.py`):

    my rows [N, W] ──all-gather──► everyone's rows [P * N, W] ──index copy──► pages [num_slots, W]

N is the largest number of tokens that any rank has in the step, so all ranks send the same shape and a rank without
tokens takes part like the others. Padding rows are written to the null block.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from twofold.parallel.mesh import Mesh


@dataclass(slots=True)
class ExchangePlan:
    """Where a step's rows go; the same on every rank but for `num_tokens`."""

    num_tokens: int  # of this rank
    max_num_tokens: int  # of any rank: N
    slots: torch.Tensor  # [P * N] gathered row -> slot of the cache


class Exchange(Protocol):
    """How rows get to the other ranks. Callers fill a buffer and publish it; they do not see when or how it travels."""

    num_bytes: int  # received from other ranks, since the start

    def begin(self, plan: ExchangePlan) -> None:
        """Starts a step. What `buffer` returned in earlier steps is void."""

    def buffer(self, width: int, like: torch.Tensor) -> torch.Tensor:
        """Where the caller writes its rows [num_tokens, width] of one layer, for `publish` to send."""

    def publish(self, rows: torch.Tensor, cache: torch.Tensor) -> None:
        """Writes every rank's rows into `cache` [num_slots, width]; work enqueued afterwards sees them all.

        `rows` is what `buffer` returned for this layer, filled.
        """


class AllGatherExchange:
    """One packed all-gather a layer: the reference for every other exchange."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self._buffers: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        self.num_bytes = 0

    def begin(self, plan: ExchangePlan) -> None:
        self._plan = plan

    def buffer(self, width: int, like: torch.Tensor) -> torch.Tensor:
        return self._gathered(width, like)[1][: self._plan.num_tokens]

    def publish(self, rows: torch.Tensor, cache: torch.Tensor) -> None:
        gathered, mine = self._gathered(rows.shape[1], rows)
        self.mesh.all_gather(gathered, mine)
        cache.index_copy_(0, self._plan.slots, gathered)
        self.num_bytes += (gathered.numel() - mine.numel()) * gathered.element_size()

    def _gathered(self, width: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Everyone's rows [P * N, width], and this rank's part of them [N, width]: the gather is in place."""
        plan, size = self._plan, self.mesh.size * self._plan.max_num_tokens
        buffer = self._buffers.get((width, like.dtype))
        if buffer is None or len(buffer) < size:
            # Zeros, so that padding never holds a NaN that came with the memory.
            buffer = self._buffers[width, like.dtype] = torch.zeros(size, width, dtype=like.dtype, device=like.device)
        start = self.mesh.rank * plan.max_num_tokens
        return buffer[:size], buffer[start : start + plan.max_num_tokens]
