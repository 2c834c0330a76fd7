"""The plan of a step: which rank computes which tokens, and where each KV entry and each sampled token goes.

A plan is a pure function of the scheduled batch and the layout, so every rank makes the same one without asking. It is
for all ranks: it says what each of them does. NumPy only; `worker/input_batch.py` makes one rank's tensors from it.

By tokens (context parallelism), a request's scheduled tokens are cut into chunks that differ by at most one token. A
policy says which rank computes which chunk. Causal attention makes late chunks cost more than early ones, so
`dual_chunk_swap` gives each rank a head and a tail, and with them the same number of attended pairs (zigzag; "The Llama
3 Herd of Models", section 3.3.2). A chunk is a *row* (virtual request) of an ordinary batch. A request of fewer tokens
than there are chunks, a decode for example, is one row of one rank; these are dealt out by context length.

By heads (tensor parallelism), every rank computes its heads and columns of all tokens: a request is one row on every
rank. It is still sampled by one of them, its owner. Between nodes sums over ranks would be slow: of several nodes, one
has a request, which is a row on every rank there.

PCP=2 example by tokens: a prompt of 8 tokens A...H and a decode X

    tokens           A B | C D | E F | G H     X        4 chunks of the prompt; X is one row
    rank             0     1     1     0       0
    gathered         [ A B G H X | C D E F _ ]          rank 0's part, then rank 1's, each padded to N = 5 tokens
    rows             [ AB  GH  X | CD  EF ]             row_ptr = [0, 3, 5]
    sampled          [ GH  X | _  _ ]                   the rows that end their request; -1 stands for padding
    owner            request 0 -> rank 0, request 1 -> rank 0

The same by heads

    gathered         [ A B C D E F G H X | A B C D E F G H X ]      rank 0's part of each KV entry, then rank 1's
    rows             [ A-H  X | A-H  X ]                            row_ptr = [0, 2, 4]
    sampled          [ A-H | X ]
    owner            request 0 -> rank 0, request 1 -> rank 1

The same by heads on 2 nodes of 2 ranks: node 0 has the prompt, node 1 the decode

    rank             0                 1                 2                 3
    rows             [ A-H             | A-H             | X               | X ]               row_ptr = [0, 1, 2, 3, 4]
    gathered         [ A B C D E F G H | X _ _ _ _ _ _ _ | A B C D E F G H | X _ _ _ _ _ _ _ ] of ranks 0, 2, 1, 3
    sampled          [ A-H             | _               | X               | _ ]
    owner            request 0 -> rank 0, request 1 -> rank 2
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from twofold.config import PARTITION_POLICIES
from twofold.contract import ScheduledBatch
from twofold.errors import ConfigError

IntArray = NDArray[np.int64]


def dual_chunk_swap(num_ranks: int) -> IntArray:
    """Rank of each of 2P chunks: 0, 1, ..., P-1, P-1, ..., 1, 0."""
    ranks = np.arange(num_ranks)
    return np.concatenate([ranks, ranks[::-1]])


def contiguous(num_ranks: int) -> IntArray:
    """Rank of each of P chunks: 0, 1, ..., P-1. The last rank attends to the most: a baseline to compare with."""
    return np.arange(num_ranks)


POLICIES: dict[str, Callable[[int], IntArray]] = dict(
    zip(PARTITION_POLICIES, (dual_chunk_swap, contiguous), strict=True)
)


class Layout(Protocol):
    """How the ranks share a step: by tokens or by heads."""

    @property
    def num_ranks(self) -> int: ...

    @property
    def num_nodes(self) -> int: ...

    @property
    def by_heads(self) -> bool: ...

    def rows(self, batch: ScheduledBatch) -> "Rows":
        """Assigns every scheduled token to one row of one rank."""

    def max_keys(self, num_tokens: int) -> int:
        """Most keys that a rank's rows attend to if they have `num_tokens` tokens in all, and no token was computed
        before. Each row counts its own keys, also if two rows share a request."""

    def max_decodes(self, num_requests: int) -> int:
        """Most rows of a rank in a step of so many decodes."""


@dataclass(frozen=True, slots=True)
class Rows:
    """V rows of all ranks, sorted by rank, then request, then start.

    By heads a token is in a row of every rank of one node.
    """

    rank: IntArray  # [V]
    request_idx: IntArray  # [V] row -> request of the scheduled batch
    start: IntArray  # [V] tokens of the request before the row, on whichever rank
    length: IntArray  # [V] tokens that the row computes
    owner: IntArray  # [R] request -> rank that samples it, one of those that compute its last scheduled token


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """By tokens: each rank computes whole layers of its rows, on whichever node it is."""

    num_ranks: int
    policy: str = "dual_chunk_swap"
    num_nodes: int = 1
    by_heads = False

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(
                f"partition_policy must be one of {', '.join(POLICIES)}, got {self.policy!r}", field="partition_policy"
            )

    def chunk_rank(self) -> IntArray:
        """[C] chunk of a request -> rank."""
        return POLICIES[self.policy](self.num_ranks) if self.num_ranks > 1 else np.zeros(1, np.int64)

    def max_keys(self, num_tokens: int) -> int:
        chunk_rank = self.chunk_rank()
        ends = np.arange(1, len(chunk_rank) + 1)  # of chunks, in chunks
        keys = int(np.bincount(chunk_rank, ends).max())  # of a request of C chunks, on the rank with the most
        return -(-num_tokens * self.num_ranks * keys // len(chunk_rank))

    def max_decodes(self, num_requests: int) -> int:
        return -(-num_requests // self.num_ranks)

    def rows(self, batch: ScheduledBatch) -> Rows:
        num_requests, num_ranks = len(batch), self.num_ranks
        computed, scheduled = batch.num_computed_tokens, batch.num_scheduled_tokens
        is_split = (scheduled >= 2 * num_ranks) & (num_ranks > 1)
        split, whole = np.flatnonzero(is_split), np.flatnonzero(~is_split)

        chunk_rank = self.chunk_rank()
        num_chunks = len(chunk_rank)
        base, extra = np.divmod(scheduled[split], num_chunks)
        # Extra tokens go around the ranks, on from where the previous request's stopped, heads before tails.
        turn = (chunk_rank - (np.cumsum(extra) - extra)[:, None]) % num_ranks
        turn = turn + num_ranks * (np.arange(num_chunks) >= num_ranks)
        lengths = base[:, None] + (turn < extra[:, None])  # [split, C]
        starts = computed[split, None] + np.cumsum(lengths, axis=1) - lengths

        whole_rank = deal(computed[whole] + scheduled[whole], num_ranks)  # by the length of contexts

        request_idx = np.concatenate([np.repeat(split, num_chunks), whole])
        start = np.concatenate([starts.ravel(), computed[whole]])
        length = np.concatenate([lengths.ravel(), scheduled[whole]])
        rank = np.concatenate([np.tile(chunk_rank, len(split)), whole_rank])
        order = np.argsort(rank * num_requests + request_idx, kind="stable")  # chunks of one request already ascend
        owner = np.empty(num_requests, np.int64)
        owner[split], owner[whole] = chunk_rank[-1], whole_rank
        return Rows(rank[order], request_idx[order], start[order], length[order], owner)


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """By heads: each rank of a node computes its heads and columns of all rows of that node's requests.

    Requests are dealt out to the nodes, and those of a node to its ranks to be sampled.
    """

    num_ranks: int
    num_nodes: int = 1
    by_heads = True

    def node_of(self, batch: ScheduledBatch) -> IntArray:
        """[R] request -> node: by its tokens in the step, and among equal ones by the length of its context."""
        return deal((batch.num_scheduled_tokens << 32) + batch.num_computed_tokens, self.num_nodes)

    def max_keys(self, num_tokens: int) -> int:
        return num_tokens

    def max_decodes(self, num_requests: int) -> int:
        return -(-num_requests // self.num_nodes)

    def rows(self, batch: ScheduledBatch) -> Rows:
        num_places, node = self.num_ranks // self.num_nodes, self.node_of(batch)
        of_node = [np.flatnonzero(node == number) for number in range(self.num_nodes)]
        counts = np.repeat([len(requests) for requests in of_node], num_places)  # [P] rank -> its rows
        request_idx = np.concatenate([np.tile(requests, num_places) for requests in of_node])
        owner = np.empty(len(batch), np.int64)
        for number, requests in enumerate(of_node):
            owner[requests] = number * num_places + np.arange(len(requests)) % num_places
        return Rows(
            rank=np.repeat(np.arange(self.num_ranks), counts),
            request_idx=request_idx,
            start=batch.num_computed_tokens[request_idx],
            length=batch.num_scheduled_tokens[request_idx],
            owner=owner,
        )


def deal(weights: IntArray, num_hands: int) -> IntArray:
    """[R] request -> the hand that gets it: the heaviest first, back and forth over the hands."""
    place = np.empty(len(weights), np.int64)
    place[np.argsort(-weights, kind="stable")] = np.arange(len(weights)) % (2 * num_hands)
    return np.minimum(place, 2 * num_hands - 1 - place)


@dataclass(frozen=True, slots=True)
class Buckets:
    """Numbers of tokens that a rank's part of a step is padded to, ascending; longer parts are not padded."""

    decode: tuple[int, ...] = ()
    prefill: tuple[int, ...] = ()

    def pad(self, num_tokens: int, is_decode: bool) -> int:
        return next((size for size in (self.decode if is_decode else self.prefill) if size >= num_tokens), num_tokens)


UNPADDED = Buckets()


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What every rank does in a step. V rows sorted by rank, then request, then start; R requests, P ranks.

    T is the number of all ranks' tokens, by heads those of the batch times the ranks of a node; tokens are in the order
    of rows. Each rank's part of the gathered KV entries has N places.
    """

    by_heads: bool
    num_nodes: int

    request_idx: IntArray  # [V] row -> request of the scheduled batch
    start: IntArray  # [V] tokens of the request before the row, on whichever rank
    length: IntArray  # [V] tokens that the row computes
    row_ptr: IntArray  # [P + 1] rank -> its first row
    owner: IntArray  # [R] request -> rank that samples its next token
    num_tokens: IntArray  # [P] computed by each rank
    num_pairs: IntArray  # [P] (query, key) pairs attended by each rank
    num_padded_tokens: int  # N
    sampled_row: IntArray  # [P, S] a rank's sampled tokens -> row that each follows; -1 is padding
    is_decode: bool  # every request has one token
    needs_all_hidden_states: bool  # else only those of each row's last token are used

    @property
    def num_ranks(self) -> int:
        return len(self.num_tokens)

    @property
    def defer_exchange(self) -> bool:
        """Whether KV entries may travel when the step ends, those of all layers together: no rank attends to another
        rank's new ones."""
        return self.is_decode or self.by_heads

    def node_of(self, rank: int) -> int:
        """Rank -> its node."""
        return rank * self.num_nodes // self.num_ranks

    def rows_of(self, rank: int) -> slice:
        return slice(int(self.row_ptr[rank]), int(self.row_ptr[rank + 1]))

    def token_row(self) -> IntArray:
        """[T] token -> row."""
        return np.repeat(np.arange(len(self.length)), self.length)

    def token_position(self) -> IntArray:
        """[T] token -> its position in its request."""
        row_end = np.cumsum(self.length)
        shift = row_end - self.length - self.start
        positions: IntArray = np.arange(int(self.length.sum())) - np.repeat(shift, self.length)
        return positions

    def gathered_idx(self) -> IntArray:
        """[T] token -> place of its KV entry among the P * N gathered ones (`exchange.py` has their order)."""
        rank_end = np.cumsum(self.num_tokens)
        part = np.arange(self.num_ranks).reshape(-1, self.num_nodes).T.ravel()  # rank -> its part of the gathered ones
        shift = part * self.num_padded_tokens - (rank_end - self.num_tokens)
        places: IntArray = np.arange(int(rank_end[-1])) + np.repeat(shift, self.num_tokens)
        return places

    # Bounds over all ranks. A CUDA graph serves the step if these are within its own bounds, so all ranks agree.

    @property
    def max_num_rows(self) -> int:
        """Most rows of a rank, including one row of padding."""
        return int(np.diff(self.row_ptr).max()) + 1

    @property
    def max_decode_len(self) -> int:
        """Tokens of the longest request that has a row of one token on any rank."""
        return int((self.start[self.length == 1] + 1).max(initial=0))

    def max_row_blocks(self, block_size: int) -> int:
        """Most blocks of a rank's rows, each row's own, and of its padding."""
        blocks = np.concatenate([[0], np.cumsum(-(-(self.start + self.length) // block_size))])
        padding = -(-(self.num_padded_tokens - self.num_tokens) // block_size)
        return int((np.diff(blocks[self.row_ptr]) + padding).max())


def plan_step(batch: ScheduledBatch, layout: Layout, buckets: Buckets = UNPADDED) -> StepPlan:
    """Plans a step for all ranks."""
    rows, num_ranks = layout.rows(batch), layout.num_ranks
    start, length = rows.start, rows.length
    row_ptr = np.searchsorted(rows.rank, np.arange(num_ranks + 1))
    num_tokens = _sum_by(rows.rank, length, num_ranks)
    is_decode = bool((batch.num_scheduled_tokens == 1).all())

    # A request samples after its last scheduled token: in its owner's row that ends there.
    assert int(batch.num_sampled_tokens.max(initial=0)) <= 1, "a step samples one token of a request"
    end = batch.num_computed_tokens + batch.num_scheduled_tokens
    is_sampled = (start + length == end[rows.request_idx]) & (batch.num_sampled_tokens[rows.request_idx] > 0)
    sampled = np.flatnonzero(is_sampled & (rows.rank == rows.owner[rows.request_idx]))
    bounds = np.searchsorted(sampled, row_ptr)  # rank -> its first sampled row
    counts = np.diff(bounds)
    sampled_row = np.full((num_ranks, int(counts.max())), -1, np.int64)
    sampled_row[rows.rank[sampled], np.arange(len(sampled)) - np.repeat(bounds[:-1], counts)] = sampled

    return StepPlan(
        by_heads=layout.by_heads,
        num_nodes=layout.num_nodes,
        request_idx=rows.request_idx,
        start=start,
        length=length,
        row_ptr=row_ptr,
        owner=rows.owner,
        num_tokens=num_tokens,
        num_pairs=_sum_by(rows.rank, length * start + length * (length + 1) // 2, num_ranks),
        num_padded_tokens=buckets.pad(int(num_tokens.max()), is_decode),
        sampled_row=sampled_row,
        is_decode=is_decode,
        needs_all_hidden_states=is_decode or bool(batch.prompt_logprobs.any()),
    )


def _sum_by(index: IntArray, values: IntArray, size: int) -> IntArray:
    total = np.zeros(size, np.int64)
    np.add.at(total, index, values)  # exact in int64, where a weighted bincount would round at 2**53
    return total
