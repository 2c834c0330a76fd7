"""A rank's share of the KV cache, where no rank keeps all of it. P ranks together hold P times as many tokens.

    by heads     entry   | heads of rank 0 | heads of rank 1 |       a rank keeps its columns of every block
    by blocks    block 1 is rank 0's, block 2 rank 1's, block 3 rank 0's, ...; entries are whole

A layer is divided by heads if its KV heads divide; otherwise by blocks, and so are latents, which all heads share.
Blocks are numbered as the engine counts them, over all ranks. A rank keeps those that it has at *places*; place 0 is
the null block, of which each rank has one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

ALIGNMENT = 256  # bytes, of a layer's first entry

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LayerShare:
    """How one layer's entries are divided over P ranks."""

    entry_width: int  # numbers in a whole entry
    by_heads: bool
    num_ranks: int
    num_heads: int  # of queries
    window: int | None = None  # tokens that a query attends to, itself among them

    @property
    def width(self) -> int:
        """Numbers of an entry that a rank keeps, of the entries that it has."""
        return self.entry_width // self.num_ranks if self.by_heads else self.entry_width

    def num_places(self, num_blocks: int) -> int:
        """Blocks of `num_blocks` that a rank has room for, its null block among them."""
        return num_blocks if self.by_heads else int(place_of(np.array(num_blocks - 1), self.num_ranks)) + 1

    def columns(self, rank: int) -> slice:
        """What a rank keeps of an entry."""
        return slice(rank * self.width, (rank + 1) * self.width) if self.by_heads else slice(0, self.width)


def owner_of(blocks: IntArray, num_ranks: int) -> IntArray:
    """Block -> rank that keeps it, where blocks are divided. Of the null block any."""
    return (blocks - 1) % num_ranks


def place_of(blocks: IntArray, num_ranks: int) -> IntArray:
    """Block -> its place on the rank that keeps it: the null block's is 0."""
    return -(-blocks // num_ranks)


class ShardedKVCache:
    """The shares of all ranks: mine, and views of my peers' memory. They start as zeros, as a `KVCache` does."""

    def __init__(
        self,
        shares: Sequence[LayerShare],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        rank: int,
        allocate: Callable[[int], list[torch.Tensor]],
    ) -> None:
        """`allocate` takes so many bytes on every rank, and gives everyone's. `num_blocks` are those of all ranks."""
        self.num_blocks, self.block_size, self.shares, self.rank = num_blocks, block_size, list(shares), rank
        self.stacks: list[torch.Tensor] = []  # nothing travels when a step ends
        self.whole_stacks: list[torch.Tensor] = []
        memory = allocate(num_bytes(shares, num_blocks, block_size, dtype))
        # [rank][layer], each [places, block_size, width]
        self.everyones = [_layers(mine, shares, num_blocks, block_size, dtype) for mine in memory]
        self.blocks = self.everyones[rank]
        self.slots = [blocks.flatten(0, 1) for blocks in self.blocks]


def num_bytes(shares: Sequence[LayerShare], num_blocks: int, block_size: int, dtype: torch.dtype) -> int:
    """Memory that each rank takes for a cache of `num_blocks` blocks over all ranks."""
    return sum(_layer_bytes(share, num_blocks, block_size, dtype) for share in shares)


def max_num_blocks(shares: Sequence[LayerShare], num_bytes: int, block_size: int, dtype: torch.dtype) -> int:
    """Blocks over all ranks that `num_bytes` of each rank have room for."""
    lasting = sum(ALIGNMENT for _ in shares)
    lasting += sum(2 * share.entry_width * block_size * dtype.itemsize for share in shares if not share.by_heads)
    return max(0, int((num_bytes - lasting) // bytes_per_block(shares, block_size, dtype)))


def bytes_per_block(shares: Sequence[LayerShare], block_size: int, dtype: torch.dtype) -> float:
    """Memory that a block takes of each rank, on average."""
    return sum(share.entry_width / share.num_ranks for share in shares) * block_size * dtype.itemsize


def _layer_bytes(share: LayerShare, num_blocks: int, block_size: int, dtype: torch.dtype) -> int:
    exact = share.num_places(num_blocks) * block_size * share.width * dtype.itemsize
    return -(-exact // ALIGNMENT) * ALIGNMENT


def _layers(
    memory: torch.Tensor, shares: Sequence[LayerShare], num_blocks: int, block_size: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Views of a rank's memory, one for each layer."""
    sizes = [_layer_bytes(share, num_blocks, block_size, dtype) for share in shares]
    views = []
    for share, part in zip(shares, memory.split(sizes), strict=True):
        shape = (share.num_places(num_blocks), block_size, share.width)
        exact = shape[0] * shape[1] * shape[2] * dtype.itemsize
        views.append(part[:exact].view(dtype).view(shape))
    return views
