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
        self.pages = [  # each [num_blocks, block_size, row_width]
            _zeros(num_blocks * block_size * spec.row_width, dtype, device).view(num_blocks, block_size, spec.row_width)
            for spec in specs
        ]
        self.slots = [pages.view(-1, pages.shape[-1]) for pages in self.pages]  # each [num_slots, row_width]


def bytes_per_block(specs: Sequence[AttentionSpec], block_size: int, dtype: torch.dtype) -> int:
    """Memory of one block over all layers."""
    return sum(spec.row_width for spec in specs) * block_size * dtype.itemsize


def _zeros(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    # The system's own zeros: memory is taken when a page is first written.
    return torch.from_numpy(np.zeros(size * dtype.itemsize, np.uint8)).view(dtype)
