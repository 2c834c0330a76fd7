"""A rank's paged cache: for each layer, pages of `block_size` cache rows. Block 0 is the null block for padding."""

from collections.abc import Sequence

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
        self.pages = [  # each [num_blocks, block_size, row_width]
            torch.zeros(num_blocks, block_size, spec.row_width, dtype=dtype, device=device) for spec in specs
        ]
        self.slots = [pages.view(-1, pages.shape[-1]) for pages in self.pages]  # each [num_slots, row_width]


def bytes_per_block(specs: Sequence[AttentionSpec], block_size: int, dtype: torch.dtype) -> int:
    """Memory of one block over all layers."""
    return sum(spec.row_width for spec in specs) * block_size * dtype.itemsize
