"""The blocks of the KV cache: which request writes to which block, and which full blocks can be read again.

A block holds `block_size` consecutive tokens of one request. A full block may be cached under a hash that names its
tokens and all before them; it then outlives its request and is evicted, least recently used first, only when no blank
block is left. Block 0 is the null block: padding is written there, and it is never handed out.
"""

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from twofold.errors import ConfigError, EngineError

NULL_BLOCK_ID = 0


def hash_blocks(token_ids: NDArray[np.int32], block_size: int, parent: bytes = b"") -> list[bytes]:
    """One 16-byte digest for each full block of `token_ids`, chained from `parent`, the digest of the block before."""
    num_bytes = block_size * token_ids.itemsize
    data = token_ids[: len(token_ids) // block_size * block_size].tobytes()
    hashes = []
    for offset in range(0, len(data), num_bytes):
        parent = blake2b(parent + data[offset : offset + num_bytes], digest_size=16).digest()
        hashes.append(parent)
    return hashes


class BlockPool:
    """Hands out blocks by id, counts references to them, and finds cached ones by hash.

    `num_blocks` includes the null block, `block_size` is in tokens. Raises ConfigError if no block could be handed out.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 2 or block_size < 1:
            raise ConfigError(f"{num_blocks} blocks of {block_size} tokens hold nothing; block 0 is for padding only")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._num_refs = [0] * num_blocks
        # Blank blocks: those below `_first_fresh` are in a heap, so that allocations ascend; the rest were never used.
        self._first_fresh = NULL_BLOCK_ID + 1
        self._returned: list[int] = []
        self._evictable: OrderedDict[int, None] = OrderedDict()  # cached, unreferenced; the next to be evicted is first
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out: blank ones, and cached ones without a reference."""
        return len(self._returned) + self.num_blocks - self._first_fresh + len(self._evictable)

    @property
    def num_cached(self) -> int:
        """Blocks that `find_prefix` can find."""
        return len(self._block_of)

    @property
    def capacity_tokens(self) -> int:
        """Tokens of one request that the whole pool holds."""
        return (self.num_blocks - 1) * self.block_size

    def blocks_needed(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens of one request occupy."""
        return -(-num_tokens // self.block_size)

    def find_prefix(self, block_hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest cached prefix. They are not held until `touch`."""
        blocks: list[int] = []
        for block_hash in block_hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def allocate(self, n: int) -> list[int] | None:
        """`n` blocks with one reference each, ids ascending; None, and nothing changes, if fewer are free."""
        if n > self.num_free:
            return None
        blocks = [heappop(self._returned) for _ in range(min(n, len(self._returned)))]
        fresh = min(n - len(blocks), self.num_blocks - self._first_fresh)
        blocks += range(self._first_fresh, self._first_fresh + fresh)
        self._first_fresh += fresh
        if len(blocks) < n:
            blocks += [self._evict() for _ in range(n - len(blocks))]
            blocks.sort()
        for block in blocks:
            self._num_refs[block] = 1
        return blocks

    def touch(self, blocks: Sequence[int]) -> None:
        """Take a reference to each of `blocks`, found by `find_prefix` since the last `allocate`."""
        for block in blocks:
            if not self._num_refs[block]:
                del self._evictable[block]
            self._num_refs[block] += 1

    def refresh(self, blocks: Sequence[int]) -> None:
        """Count a prefix found by `find_prefix` as used now, without a reference to it."""
        for block in reversed(blocks):  # as `free` does: the head is evicted last
            if block in self._evictable:
                self._evictable.move_to_end(block)

    def free(self, blocks: Sequence[int]) -> None:
        """Give back one reference to each of a request's blocks, listed from its first token on.

        Raises EngineError if a block has no reference left.
        """
        for block in reversed(blocks):  # fewer requests share the tail of a prompt: it is evicted first
            if not self._num_refs[block]:
                raise EngineError(f"block {block} was freed twice")
            self._num_refs[block] -= 1
            if self._num_refs[block]:
                continue
            if block in self._hash_of:
                self._evictable[block] = None
            else:
                heappush(self._returned, block)
        if len(self._returned) == self._first_fresh - 1:  # all are blank: hand out ids from the first one on again
            self._returned.clear()
            self._first_fresh = NULL_BLOCK_ID + 1

    def cache_block(self, block_id: int, block_hash: bytes) -> None:
        """Let others find a full block that is in use. Of blocks with equal content the first is cached."""
        if self.enable_prefix_caching and block_hash not in self._block_of and block_id not in self._hash_of:
            self._block_of[block_hash] = block_id
            self._hash_of[block_id] = block_hash

    def is_idle(self) -> bool:
        """Whether every block is blank, or cached without a reference."""
        return self.num_free == self.num_blocks - 1

    def reset_prefix_cache(self) -> bool:
        """Forget every cached block. False, and nothing changes, while any block is in use."""
        if not self.is_idle():
            return False
        self._evictable.clear()
        self._block_of.clear()
        self._hash_of.clear()
        self._returned.clear()
        self._first_fresh = NULL_BLOCK_ID + 1
        return True

    def _evict(self) -> int:
        block, _ = self._evictable.popitem(last=False)
        del self._block_of[self._hash_of.pop(block)]
        return block
