"""Which rank computes which tokens of a step: a pure function of the scheduled batch, the same on every rank.

Each request's scheduled tokens are cut into chunks that differ by at most one token, and a policy says which rank
computes each chunk. Causal attention makes late chunks dearer than early ones; `dual_chunk_swap` pairs them so that
every rank gets about the same number of attended pairs (zigzag, Llama 3 tech report section 3.3.2):

    chunk            0     1     2     3     4     5        P = 3
    rank             0     1     2     2     1     0
    attended pairs   *     ***   ***** ****** ...           rank r: chunk r and chunk 2P-1-r

A chunk is a *virtual request*: a row `(request, start, length)` of an ordinary batch. Requests of fewer than 2P tokens
(decodes among them) are not worth cutting: they are whole rows of one owner, dealt out by context length.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twofold.contract import ScheduledBatch
from twofold.errors import ConfigError

IntArray = NDArray[np.int64]


def dual_chunk_swap(num_ranks: int) -> IntArray:
    """Rank of each of 2P chunks: 0, 1, ..., P-1, P-1, ..., 1, 0."""
    ranks = np.arange(num_ranks)
    return np.concatenate([ranks, ranks[::-1]])


def contiguous(num_ranks: int) -> IntArray:
    """Rank of each of P chunks: 0, 1, ..., P-1. The last rank attends to the most; a baseline to compare with."""
    return np.arange(num_ranks)


Policy = Callable[[int], IntArray]
POLICIES: dict[str, Policy] = {"dual_chunk_swap": dual_chunk_swap, "contiguous": contiguous}


@dataclass(frozen=True, slots=True)
class Partition:
    """The virtual requests of all ranks. V rows, sorted by rank, then request, then start. R requests, P ranks."""

    request_idx: IntArray  # [V] row -> request of the scheduled batch
    start: IntArray  # [V] tokens of the request that stand before the row, on whichever rank
    length: IntArray  # [V] tokens that the row computes
    row_ptr: IntArray  # [P + 1] rank -> its first row
    owner: IntArray  # [R] request -> rank that computes its last scheduled token
    num_tokens: IntArray  # [P] computed by each rank
    num_pairs: IntArray  # [P] (query, key) pairs attended by each rank

    @property
    def num_ranks(self) -> int:
        return len(self.num_tokens)

    def rows_of(self, rank: int) -> slice:
        return slice(int(self.row_ptr[rank]), int(self.row_ptr[rank + 1]))


def partition(batch: ScheduledBatch, num_ranks: int, policy: str = "dual_chunk_swap") -> Partition:
    """Assigns every scheduled token of the batch to exactly one virtual request of exactly one rank."""
    if policy not in POLICIES:
        raise ConfigError(f"partition policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    num_requests = len(batch)
    computed, scheduled = batch.num_computed_tokens, batch.num_scheduled_tokens
    is_split = (scheduled >= 2 * num_ranks) & (num_ranks > 1)
    split, whole = np.flatnonzero(is_split), np.flatnonzero(~is_split)

    chunk_rank = POLICIES[policy](num_ranks)  # [C]
    num_chunks = len(chunk_rank)
    base, extra = np.divmod(scheduled[split], num_chunks)
    # Extra tokens go around the ranks, on from where the previous request's stopped, heads before tails.
    turn = (chunk_rank - (np.cumsum(extra) - extra)[:, None]) % num_ranks + num_ranks * (
        np.arange(num_chunks) >= num_ranks
    )
    lengths = base[:, None] + (turn < extra[:, None])  # [split, C]
    starts = computed[split, None] + np.cumsum(lengths, axis=1) - lengths

    # Whole rows: the longest contexts first, back and forth over the ranks.
    place = np.empty(len(whole), np.int64)
    place[np.argsort(-(computed[whole] + scheduled[whole]), kind="stable")] = np.arange(len(whole)) % (2 * num_ranks)
    whole_rank = np.minimum(place, 2 * num_ranks - 1 - place)

    request_idx = np.concatenate([np.repeat(split, num_chunks), whole])
    start = np.concatenate([starts.ravel(), computed[whole]])
    length = np.concatenate([lengths.ravel(), scheduled[whole]])
    rank = np.concatenate([np.tile(chunk_rank, len(split)), whole_rank])

    order = np.argsort(rank * num_requests + request_idx, kind="stable")  # chunks of one request already ascend
    request_idx, start, length, rank = request_idx[order], start[order], length[order], rank[order]
    owner = np.empty(num_requests, np.int64)
    owner[split] = chunk_rank[-1]
    owner[whole] = whole_rank
    pairs = length * start + length * (length + 1) // 2
    return Partition(
        request_idx=request_idx,
        start=start,
        length=length,
        row_ptr=np.searchsorted(rank, np.arange(num_ranks + 1)),
        owner=owner,
        num_tokens=_sum_by(rank, length, num_ranks),
        num_pairs=_sum_by(rank, pairs, num_ranks),
    )


def _sum_by(index: IntArray, values: IntArray, size: int) -> IntArray:
    total = np.zeros(size, np.int64)
    np.add.at(total, index, values)  # exact in int64, where a weighted bincount would round at 2**53
    return total
