"""What each rank keeps, and what that leaves room for, before a rank starts: weights, KV cache, memory to compute in.

Weights and entries are exact, by the model's configuration. What steps compute in is estimated: ranks measure it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from twofold.planning.shape import ModelShape

LEAST_BESIDE = 1 << 30  # of a GPU, beside weights and cache: what kernels and the smallest steps take in any case
MAX_RANKS, MAX_LEN = 1024, 1 << 34
KERNELS = 3 << 29  # of a GPU: its context, kernels, CUDA graphs
FETCH_SLACK = 64  # blocks of a workspace beyond those of the largest step


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked of an engine."""

    max_model_len: int
    weights: str = "auto"  # replicated, sharded
    kv_cache: str = "auto"
    max_num_batched_tokens: int | None = None  # None: 32768 a rank
    max_num_seqs: int = 256
    block_size: int = 128
    kv_cache_memory_bytes: int | None = None  # of each rank; None: all that is left

    def num_batched_tokens(self, num_ranks: int) -> int:
        return self.max_num_batched_tokens or 32768 * num_ranks

    @property
    def blocks_of_request(self) -> int:
        """Of one request of `max_model_len` tokens, and the null block; its last token is never computed."""
        return -(-(self.max_model_len - 1) // self.block_size) + 1


@dataclass(frozen=True, slots=True)
class Room:
    """Of each rank, in bytes; `num_tokens` are those of all ranks together."""

    num_ranks: int
    shards_weights: bool
    shards_cache: bool
    usable: int
    weights: int  # that a rank keeps
    buffers: int  # for layers that come from other ranks
    workspace: int  # for KV entries that come from other ranks
    beside: int  # to compute in
    cache: int
    num_tokens: int
    needed_tokens: int  # of one request, in whole blocks
    cache_needed: int  # bytes for those

    @property
    def fits(self) -> bool:
        """Whether one request of `max_model_len` tokens has room."""
        return self.num_tokens >= self.needed_tokens

    @property
    def needed(self) -> int:
        """Bytes of all that one request needs."""
        return self.weights + self.buffers + self.workspace + self.beside + self.cache_needed


def beside(shape: ModelShape, wish: Wish, num_ranks: int) -> int:
    """Estimated bytes of the largest step: what its tokens have between products, logits, kernels and graphs."""
    tokens = -(-wish.num_batched_tokens(num_ranks) // num_ranks)
    numbers = 10 * shape.hidden_size + 3 * shape.inner_numbers // max(1, shape.num_layers)
    logits = 16 * wish.max_num_seqs * shape.head // max(1, shape.hidden_size * shape.itemsize)
    return KERNELS + tokens * numbers * shape.itemsize + logits


def room(
    shape: ModelShape, usable: int, num_ranks: int, wish: Wish, *, weights: bool, cache: bool, least: bool = False
) -> Room:
    """What fits if each rank keeps a part of the weights, or of the cache. `least`: with as little beside as possible.

    A request's tokens lie in whole blocks, and block 0 holds none.
    """
    kept = shape.kept(num_ranks) if weights else shape.whole
    buffers = shape.fetched(num_ranks) if weights else 0
    workspace = _workspace(shape, num_ranks, wish) if cache else 0
    computing = LEAST_BESIDE if least else beside(shape, wish, num_ranks)
    left = max(0, usable - kept - buffers - workspace - computing)
    asked = left if wish.kv_cache_memory_bytes is None else wish.kv_cache_memory_bytes
    num_bytes = asked if asked <= left else 0
    of_block = shape.entry_on(num_ranks, cache) * wish.block_size
    spare = 2 * num_ranks + 1 if cache else 0
    num_blocks = max(0, int(num_bytes / of_block) - spare) if of_block else wish.blocks_of_request
    return Room(
        num_ranks=num_ranks,
        shards_weights=weights,
        shards_cache=cache,
        usable=usable,
        weights=kept,
        buffers=buffers,
        workspace=workspace,
        beside=computing,
        cache=int(num_blocks * of_block),
        num_tokens=max(0, num_blocks - 1) * wish.block_size,
        needed_tokens=(wish.blocks_of_request - 1) * wish.block_size,
        cache_needed=int((wish.blocks_of_request + spare) * of_block),
    )


def _workspace(shape: ModelShape, num_ranks: int, wish: Wish) -> int:
    """Two workspaces of the widest layer's entries, as `fetch_entries.py` has them, and outputs of attention."""
    num_tokens = max(wish.max_model_len, wish.num_batched_tokens(num_ranks))
    num_blocks = -(-num_tokens // wish.block_size) + FETCH_SLACK + 1
    widest = max(
        layer.entry_numbers * (num_ranks - 1) / num_ranks
        if layer.has_divided_entries(num_ranks)
        else layer.entry_numbers
        for layer in shape.attention
    )
    outputs = max(layer.num_heads * layer.v_head_dim for layer in shape.attention)
    outputs *= 2 * -(-wish.num_batched_tokens(num_ranks) // num_ranks)
    return int((2 * num_blocks * wish.block_size * widest + outputs) * shape.itemsize)


def choose(shape: ModelShape, usable: int, num_ranks: int, wish: Wish, *, least: bool = False) -> Room:
    """What an engine chooses for "auto": weights and then the cache are sharded where one request would not fit."""
    found = [
        room(shape, usable, num_ranks, wish, weights=weights, cache=cache, least=least)
        for weights, cache in _holdings(shape, num_ranks, wish)
    ]
    return next((room for room in found if room.fits), found[-1])


def _holdings(shape: ModelShape, num_ranks: int, wish: Wish) -> Iterator[tuple[bool, bool]]:
    """Holdings of weights and cache (whether sharded) that are allowed, in the order in which they are tried."""
    can = num_ranks > 1 and shape.divided(num_ranks) > 0
    for cache in {"auto": (False, True), "replicated": (False,), "sharded": (True,)}[wish.kv_cache]:
        for weights in {"auto": (False, True), "replicated": (False,), "sharded": (True,)}[wish.weights]:
            if num_ranks == 1:
                yield False, False
                return
            if can or not weights:
                yield weights, cache


def ranks_needed(shape: ModelShape, memory: int, wish: Wish, *, least: bool = False) -> Room | None:
    """The fewest ranks with so much memory each on which a request fits; None if no number will do."""
    for num_ranks in range(1, MAX_RANKS + 1):
        found = choose(shape, memory, num_ranks, wish, least=least) if _may_run(shape, num_ranks, wish) else None
        if found is not None and found.fits:
            return found
    return None


def _may_run(shape: ModelShape, num_ranks: int, wish: Wish) -> bool:
    """Sharded weights must divide."""
    return wish.weights != "sharded" or num_ranks == 1 or shape.divided(num_ranks) > 0


def longest(shape: ModelShape, usable: int, num_ranks: int, wish: Wish) -> Room | None:
    """What an engine with the largest `max_model_len` that fits would choose; None if no request fits."""
    fits, too_long = 0, MAX_LEN
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if choose(shape, usable, num_ranks, replace(wish, max_model_len=middle)).fits:
            fits = middle
        else:
            too_long = middle
    return choose(shape, usable, num_ranks, replace(wish, max_model_len=fits)) if fits else None
