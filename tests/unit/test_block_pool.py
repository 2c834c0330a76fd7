"""Blocks are handed out once, shared by content, and evicted in the right order."""

import time

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from twofold.engine.block_pool import NULL_BLOCK_ID, BlockPool, hash_blocks
from twofold.errors import ConfigError, EngineError


def take(pool: BlockPool, n: int) -> list[int]:
    blocks = pool.allocate(n)
    assert blocks is not None
    return blocks


def take_cached(pool: BlockPool, hashes: list[bytes]) -> list[int]:
    blocks = take(pool, len(hashes))
    for block, block_hash in zip(blocks, hashes, strict=True):
        pool.cache_block(block, block_hash)
    return blocks


def test_null_block_is_never_handed_out():
    """Padding is written to block 0: whoever owned it would lose its tokens."""
    pool = BlockPool(5, 2)
    assert pool.num_free == 4
    assert pool.capacity_tokens == 8
    assert NULL_BLOCK_ID not in take(pool, 4)


def test_fresh_blocks_are_consecutive():
    """Runs of blocks are what the CPU backend can read without a gather."""
    pool = BlockPool(100, 2)
    assert take(pool, 10) == list(range(1, 11))
    assert take(pool, 5) == list(range(11, 16))


@pytest.mark.parametrize("enable_prefix_caching", [False, True])
def test_freed_blank_blocks_come_back_ascending(enable_prefix_caching):
    """Churn of unhashed blocks must not shuffle the ids that later requests get."""
    pool = BlockPool(20, 2, enable_prefix_caching)
    first, second, third = take(pool, 4), take(pool, 4), take(pool, 4)
    pool.free(third)
    pool.free(first)
    assert take(pool, 6) == [*first, *third[:2]]
    pool.free([*first, *third[:2]])
    pool.free(second)
    assert pool.is_idle()
    assert take(pool, 19) == list(range(1, 20))


def test_too_many_blocks_change_nothing():
    """A refused allocation must not leak what it had gathered so far."""
    pool = BlockPool(4, 2)
    take(pool, 1)
    assert pool.allocate(3) is None
    assert pool.num_free == 2
    assert take(pool, 2) == [2, 3]
    assert take(pool, 0) == []


def test_blocks_needed_rounds_up():
    """A partly filled block is a whole block."""
    pool = BlockPool(4, 4)
    assert [pool.blocks_needed(n) for n in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]


def test_hash_names_all_tokens_before_it():
    """Equal blocks behind different prefixes hold different keys and values."""
    tokens = np.arange(10, dtype=np.int32)
    hashes = hash_blocks(tokens, 4)
    assert len(hashes) == 2
    assert all(len(h) == 16 for h in hashes)
    assert hash_blocks(tokens[4:], 4, hashes[0])[0] == hashes[1]
    assert hash_blocks(tokens[4:], 4)[0] != hashes[1]
    other = tokens.copy()
    other[0] = 99
    assert hash_blocks(other, 4)[1] != hashes[1]


def test_longest_prefix_is_found():
    """A hit ends at the first missing block, whatever follows it."""
    pool = BlockPool(10, 2)
    hashes = hash_blocks(np.arange(8, dtype=np.int32), 2)
    blocks = take_cached(pool, hashes[:2])
    pool.cache_block(take(pool, 1)[0], hashes[3])
    assert pool.find_prefix(hashes) == blocks
    assert pool.find_prefix(hashes[1:]) == blocks[1:]
    assert pool.find_prefix([b"unknown", *hashes]) == []


def test_hits_are_held_until_the_last_reference_is_gone():
    """A shared block must outlive the request that computed it."""
    pool = BlockPool(4, 2)
    blocks = take_cached(pool, [b"a", b"b", b"c"])
    pool.touch(blocks[:2])
    pool.free(blocks)
    assert pool.num_free == 1
    assert pool.allocate(2) is None
    pool.free(blocks[:2])
    assert pool.is_idle()
    pool.touch(blocks)
    assert pool.num_free == 0


def test_eviction_takes_the_oldest_request_tail_first():
    """The head of a prompt serves the most requests, so it goes last; blank blocks go before any cached one."""
    pool = BlockPool(8, 2)
    old, young = take_cached(pool, [b"a", b"b", b"c"]), take_cached(pool, [b"x", b"y"])
    pool.free(old)
    pool.free(young)
    assert take(pool, 2) == [6, 7]
    assert pool.find_prefix([b"a", b"b", b"c"]) == old
    assert take(pool, 2) == old[1:]
    assert pool.find_prefix([b"a", b"b", b"c"]) == old[:1]
    assert take(pool, 2) == [old[0], young[1]]
    assert pool.find_prefix([b"x", b"y"]) == young[:1]


def test_a_hit_makes_a_block_young():
    """Eviction is by last use, not by first."""
    pool = BlockPool(3, 2)
    a, b = take_cached(pool, [b"a"]), take_cached(pool, [b"b"])
    pool.free(a)
    pool.free(b)
    pool.touch(a)
    pool.free(a)
    assert take(pool, 1) == b


def test_equal_content_is_cached_once():
    """Two requests may compute the same block; the first stays found, the second returns to the blank blocks."""
    pool = BlockPool(4, 2)
    first, second = take_cached(pool, [b"a"]), take_cached(pool, [b"a"])
    pool.free(second)
    assert pool.find_prefix([b"a"]) == first
    pool.free(first)
    assert pool.num_cached == 1
    assert pool.is_idle()


def test_nothing_is_cached_when_disabled():
    """The switch must hold even if a caller offers a block."""
    pool = BlockPool(4, 2, enable_prefix_caching=False)
    pool.free(take_cached(pool, [b"a"]))
    assert pool.find_prefix([b"a"]) == []


def test_reset_forgets_only_an_idle_cache():
    """A reset under a running request would let its blocks be found or lost at random."""
    pool = BlockPool(6, 2)
    blocks = take_cached(pool, [b"a", b"b"])
    assert not pool.reset_prefix_cache()
    assert pool.find_prefix([b"a"]) == blocks[:1]
    pool.free(blocks)
    assert pool.reset_prefix_cache()
    assert pool.find_prefix([b"a"]) == []
    assert take(pool, 5) == [1, 2, 3, 4, 5]


def test_double_free_is_an_error():
    """A block freed twice would be given to two requests."""
    pool = BlockPool(4, 2)
    blocks = take(pool, 1)
    pool.free(blocks)
    with pytest.raises(EngineError, match="block 1"):
        pool.free(blocks)


@pytest.mark.parametrize(("num_blocks", "block_size"), [(1, 16), (8, 0)])
def test_an_empty_pool_is_refused(num_blocks, block_size):
    """A pool that can hold no token would make every request wait for ever."""
    with pytest.raises(ConfigError, match=str(num_blocks)):
        BlockPool(num_blocks, block_size)


def test_a_million_tokens_hash_quickly():
    """Hashing is on the engine's only thread; a per-token loop would stall every stream (the usual is 15 ms)."""
    tokens = np.arange(1_000_000, dtype=np.int32)
    start = time.perf_counter()
    assert len(hash_blocks(tokens, 128)) == 7812
    assert time.perf_counter() - start < 0.5


class PoolMachine(RuleBasedStateMachine):
    """A pool against a plain model of it: owners, references and contents."""

    @initialize(num_blocks=st.integers(2, 12), enable_prefix_caching=st.booleans())
    def start(self, num_blocks, enable_prefix_caching):
        self.pool = BlockPool(num_blocks, 1, enable_prefix_caching)
        self.held: list[list[int]] = []
        self.content: dict[int, bytes] = {}

    @rule(n=st.integers(0, 6), keys=st.lists(st.sampled_from([b"a", b"b", b"c", b"d"]), max_size=4))
    def allocate(self, n, keys):
        num_free = self.pool.num_free
        blocks = self.pool.allocate(n)
        assert (blocks is None) == (n > num_free)
        if blocks is None:
            return
        assert blocks == sorted(set(blocks))
        assert not {NULL_BLOCK_ID, *(b for owner in self.held for b in owner)} & set(blocks)
        for block in blocks:
            self.content.pop(block, None)
        for block, key in zip(blocks, keys, strict=False):
            self.content[block] = key
            self.pool.cache_block(block, key)
        self.held.append(blocks)

    @rule(keys=st.lists(st.sampled_from([b"a", b"b", b"c", b"d"]), max_size=4, unique=True))
    def hit(self, keys):
        blocks = self.pool.find_prefix(keys)
        assert [self.content[b] for b in blocks] == keys[: len(blocks)]
        self.pool.touch(blocks)
        self.held.append(blocks)

    @rule(data=st.data())
    def free(self, data):
        if self.held:
            self.pool.free(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule()
    def reset(self):
        assert self.pool.reset_prefix_cache() == (not any(self.held))

    @invariant()
    def counts_agree(self):
        if hasattr(self, "pool"):
            assert self.pool.num_free == self.pool.num_blocks - 1 - len({b for owner in self.held for b in owner})
            assert self.pool.is_idle() == (not any(self.held))


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, database=None)


class TestPoolMachine(PoolMachine.TestCase):
    """No sequence of operations hands a block out twice, loses one, or finds other content than was cached."""
