"""A rank's KV cache: for each layer, blocks of `block_size` KV entries. Block 0 is the null block, for padding.

A *slot* is a token's place: slot s lies in block s // block_size. The cache does not know what is in an entry.
"""

import copy
import mmap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

import torch


class KVCache:
    """The entries of all layers; block b of every layer belongs to the same tokens.

    It starts as zeros: attention may read the unwritten tail of a block with weight 0, and 0 · NaN is NaN.
    """

    def __init__(
        self, entry_widths: Sequence[int], num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """`entry_widths`: for each layer, the numbers in a KV entry."""
        self.num_blocks, self.block_size = num_blocks, block_size
        num_slots, widths = num_blocks * block_size, list(entry_widths)
        # Layers with entries of one width lie in one stack, each [layers, num_slots, entry_width].
        stacks = {
            width: _zeros(widths.count(width) * num_slots * width, dtype, device).view(-1, num_slots, width)
            for width in dict.fromkeys(widths)
        }
        self.stacks = list(stacks.values())
        self.whole_stacks: list[torch.Tensor] = []  # by heads: those of which no rank has a part
        layers = {width: iter(stack) for width, stack in stacks.items()}
        self.slots = [next(layers[width]) for width in widths]  # each [num_slots, entry_width]
        # each [num_blocks, block_size, entry_width]
        self.blocks = [slots.view(num_blocks, block_size, -1) for slots in self.slots]

    def part(self, rank: int, entry_widths: Sequence[int]) -> Self:
        """The same memory as a rank sees it in steps by heads.

        Of a layer with narrower `entry_widths` its blocks are only the columns of the rank's part. `stacks` are those
        with such layers, `whole_stacks` the others.
        """
        part = copy.copy(self)
        layers = zip(self.blocks, entry_widths, strict=True)
        part.blocks = [
            blocks if blocks.shape[-1] == width else blocks[..., rank * width : (rank + 1) * width]
            for blocks, width in layers
        ]
        divided = {whole.shape[-1] for whole, mine in zip(self.blocks, part.blocks, strict=True) if whole is not mine}
        part.stacks = [stack for stack in self.stacks if stack.shape[-1] in divided]
        part.whole_stacks = [stack for stack in self.stacks if stack.shape[-1] not in divided]
        return part


def bytes_per_block(entry_widths: Sequence[int], block_size: int, dtype: torch.dtype) -> int:
    """Memory of one block over all layers."""
    return sum(entry_widths) * block_size * dtype.itemsize


@dataclass(frozen=True, slots=True)
class Write:
    """Where entries go that have come from all ranks."""

    slots: torch.Tensor  # [n]
    kv_slots: torch.Tensor  # [num_slots, width]
    columns: slice = field(default_factory=lambda: slice(None))  # of each entry, so many as a slot has


def write_entries(entries: torch.Tensor, slots: torch.Tensor, kv_slots: torch.Tensor) -> None:
    """kv_slots[slots[i]] = entries[i]. entries [n, entry_width], slots [n], kv_slots [num_slots, entry_width]."""
    if entries.is_cuda:
        from twofold.kv.kernels import scatter_entries  # Triton is on GPU machines only

        scatter_entries(entries, slots, kv_slots)
    else:
        kv_slots.index_copy_(0, slots, entries)


def copy_blocks(kv_cache: torch.Tensor, sources: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """[n, block_size, entry_width]: a copy of kv_cache[sources[i]], of anything where that is -1.

    kv_cache [num_blocks, block_size, entry_width] and `out`, if it is given, contiguous; sources [n].
    """
    if kv_cache.is_cuda:
        from twofold.kv.kernels import gather_blocks

        return gather_blocks(kv_cache, sources, out)
    return torch.index_select(kv_cache, 0, sources.clamp(min=0), out=out)


def _zeros(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    # The system's own zeros: memory is taken when it is first written. An allocator would clear what was freed before.
    memory = mmap.mmap(-1, size * dtype.itemsize, flags=mmap.MAP_PRIVATE)
    with suppress(AttributeError, OSError):  # a system without them, or Python's build for one
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)
