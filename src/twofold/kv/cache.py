"""A rank's paged cache: for each layer, pages of `block_size` cache rows. Block 0 is the null block for padding."""

from collections.abc import Sequence

import numpy as np
import torch

from twofold.attention.spec import AttentionSpec


class KVCache:
    """All layers' pages; block b of every layer belongs to the same tokens.

    Zeroed at the start: attention may read the unwritten tail of a page with weight 0, and 0 · NaN is NaN.
    """

    def __init__(
        self, specs: Sequence[AttentionSpec], num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        num_slots, widths = num_blocks * block_size, [spec.entry_width for spec in specs]
        # Layers with rows of one width lie in one stack, each [layers, num_slots, entry_width].
        stacks = {
            width: _zeros(widths.count(width) * num_slots * width, dtype, device).view(-1, num_slots, width)
            for width in dict.fromkeys(widths)
        }
        self.stacks = list(stacks.values())
        layers = {width: iter(stack) for width, stack in stacks.items()}
        self.slots = [next(layers[width]) for width in widths]  # each [num_slots, entry_width]
        # each [num_blocks, block_size, entry_width]
        self.blocks = [slots.view(num_blocks, block_size, -1) for slots in self.slots]


def bytes_per_block(specs: Sequence[AttentionSpec], block_size: int, dtype: torch.dtype) -> int:
    """Memory of one block over all layers."""
    return sum(spec.entry_width for spec in specs) * block_size * dtype.itemsize


def _zeros(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    # The system's own zeros: memory is taken when a page is first written.
    return torch.from_numpy(np.zeros(size * dtype.itemsize, np.uint8)).view(dtype)


def write_entries(entries: torch.Tensor, slots: torch.Tensor, kv_slots: torch.Tensor) -> None:
    """kv_slots[slots[i]] = entries[i]. entries [n, entry_width], slots [n], kv_slots [num_slots, entry_width]."""
    if entries.device.type == "cuda":
        from twofold.kv.scatter import scatter_entries  # Triton is on GPU machines only

        scatter_entries(entries, slots, kv_slots)
    else:
        kv_slots.index_copy_(0, slots, entries)
