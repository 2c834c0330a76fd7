"""What a rank fetches in a step where each rank keeps a share of the KV cache: index arithmetic over blocks."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from twofold.attention.metadata import AttentionMetadata
from twofold.attention.own_blocks import OwnBlocks
from twofold.contract import ScheduledBatch
from twofold.kv.sharded import LayerShare, owner_of, place_of
from twofold.parallel.fetch_entries import FetchPlan, Placement, Source
from twofold.parallel.plan import StepPlan
from twofold.worker.input_batch import InputBatch, to_device
from twofold.worker.request_states import RequestStates

IntArray = NDArray[np.int64]


def plan_fetch(
    scheduled: ScheduledBatch,
    batch: InputBatch,
    rank: int,
    block_size: int,
    num_blocks: int,
    shares: Iterable[LayerShare],
) -> FetchPlan:
    """`batch` is the rank's part of the step, `num_blocks` of the cache; `shares` of the layers that need a workspace.

    PCP=2 example: rank 0 has rows of a request with blocks 5, 6, 7, 8; 5 and half of 6 were computed before

        by heads       workspace  | null | 5 | 6 | 7 | 8 |      of rank 1's heads: 5 and 6 are fetched
        by blocks      workspace  | null | 5 | 6 | 7 | 8 |      whole: 5 is rank 0's own, 6 is rank 1's
    """
    placements, tables = {}, batch.metadata.block_tables_np
    for by_heads, window in {(share.by_heads, share.window) for share in shares}:
        prefix, new = _blocks_of_rows(scheduled, batch.plan, tables, rank, block_size, window)
        placements[by_heads, window] = _place(batch, prefix, new, rank, block_size, num_blocks, by_heads)
    return FetchPlan(bool((scheduled.num_computed_tokens > 0).any()), placements)


def plan_own_blocks(
    scheduled: ScheduledBatch, batch: InputBatch, states: RequestStates, rank: int, block_size: int
) -> OwnBlocks:
    """For a step of decodes: of each row the blocks that this rank has, if blocks are divided.

    PCP=2 example: a row has 21 tokens in blocks 5, 8, 7 of 8 tokens; rank 0 has 5 and 7, which makes 13 tokens
    """
    plan, num_ranks = batch.plan, batch.plan.num_ranks
    rows = plan.rows_of(rank) if plan.by_heads else slice(None)
    ends = (plan.start + plan.length)[rows]
    num_rows = plan.num_padded_tokens * (1 if plan.by_heads else num_ranks)
    place = np.arange(len(ends)) if plan.by_heads else plan.gathered_idx()  # [V] row -> its place among the padded ones
    num_columns = -(-int(ends.max()) // block_size)
    tables = states.block_tables[scheduled.state_idx[plan.request_idx[rows]], :num_columns].astype(np.int64)
    num_used, column = -(-ends // block_size), np.arange(num_columns)
    is_mine = (owner_of(tables, num_ranks) == rank) & (column < num_used[:, None]) & (tables > 0)
    counts = is_mine.sum(axis=1)
    has_last = is_mine[np.arange(len(ends)), num_used - 1]
    order = np.argsort(~is_mine, axis=1, kind="stable")[:, : max(1, int(counts.max()))]  # mine first
    kept = np.take_along_axis(np.where(is_mine, place_of(tables, num_ranks), 0), order, axis=1)

    seq_lens, block_tables = np.zeros(num_rows, np.int64), np.zeros((num_rows, kept.shape[1]), np.int32)
    seq_lens[place] = counts * block_size - has_last * (num_used * block_size - ends)
    block_tables[place] = kept
    query_start = np.arange(num_rows + 1)
    on_device = to_device(
        {
            "query_start": query_start.astype(np.int32),
            "seq_lens": seq_lens.astype(np.int32),
            "block_tables": block_tables,
            "slots": _slots_of_share(batch.slots_np, rank, num_ranks, block_size),
        },
        batch.metadata.block_tables.device,
    )
    metadata = AttentionMetadata(
        num_tokens=num_rows,
        query_start_np=query_start,
        seq_lens_np=seq_lens,
        block_tables_np=block_tables,
        query_start=on_device["query_start"],
        seq_lens=on_device["seq_lens"],
        block_tables=on_device["block_tables"],
        max_query_len=1,
        max_seq_len=int(seq_lens.max()),
        num_row_blocks=0,
        num_decode_rows=num_rows,
    )
    return OwnBlocks(metadata, plan.by_heads, on_device["slots"])


def _slots_of_share(slots: IntArray, rank: int, num_ranks: int, block_size: int) -> IntArray:
    """[n] slots of the cache -> slots of this rank's share, if blocks are divided; 0 where another rank keeps them."""
    block, offset = np.divmod(slots, block_size)
    is_mine = (owner_of(block, num_ranks) == rank) & (block > 0)
    return np.where(is_mine, place_of(block, num_ranks) * block_size + offset, 0)


def _blocks_of_rows(
    scheduled: ScheduledBatch,
    plan: StepPlan,
    block_tables: NDArray[np.int32],
    rank: int,
    block_size: int,
    window: int | None,
) -> tuple[IntArray, IntArray]:
    """The blocks that the rank's rows attend to: those with entries of earlier steps, and those without."""
    rows, column = plan.rows_of(rank), np.arange(block_tables.shape[1])
    ends = plan.start[rows] + plan.length[rows]
    computed = scheduled.num_computed_tokens[plan.request_idx[rows]]
    first = np.zeros_like(ends) if window is None else np.maximum(plan.start[rows] + 1 - window, 0) // block_size
    used, before = (
        np.unique(block_tables[(column >= first[:, None]) & (column < -(-lens[:, None] // block_size))]).astype(
            np.int64
        )
        for lens in (ends, computed)
    )
    used, before = used[used > 0], before[before > 0]
    new: IntArray = np.setdiff1d(used, before, assume_unique=True)
    return before, new


def _place(
    batch: InputBatch, prefix: IntArray, new: IntArray, rank: int, block_size: int, num_blocks: int, by_heads: bool
) -> Placement:
    num_ranks = batch.plan.num_ranks
    owners = owner_of(prefix, num_ranks)
    if not by_heads:  # each owner's blocks side by side, so that neighbours of its share stay neighbours
        prefix = prefix[np.lexsort((prefix, owners))]
    place_in_workspace = np.zeros(num_blocks, np.int64)  # [num_blocks] block -> block of the workspace
    place_in_workspace[prefix] = np.arange(1, len(prefix) + 1)
    place_in_workspace[new] = np.arange(len(prefix) + 1, len(prefix) + len(new) + 1)

    block, offset = np.divmod(batch.slots_np, block_size)
    place = place_in_workspace[block]
    slots = np.where(place > 0, place * block_size + offset, 0)
    my_slots = batch.slots_np if by_heads else _slots_of_share(batch.slots_np, rank, num_ranks, block_size)

    if by_heads:
        wanted = [(peer, 1, prefix) for peer in range(num_ranks) if peer != rank]
    else:
        counts = np.bincount(owners, minlength=num_ranks)
        firsts = 1 + np.cumsum(counts) - counts
        wanted = [
            (owner, first, place_of(prefix[first - 1 : first - 1 + count], num_ranks))
            for owner, (first, count) in enumerate(zip(firsts.tolist(), counts.tolist(), strict=True))
        ]
    wanted = [source for source in wanted if len(source[2])]

    metadata = batch.metadata
    tables_np = place_in_workspace[metadata.block_tables_np].astype(np.int32)
    num_padding = len(metadata.seq_lens) - len(tables_np)
    on_device = to_device(
        {
            "slots": slots,
            "my_slots": my_slots,
            "block_tables": np.pad(tables_np, ((0, num_padding), (0, 0))),
            **{f"places {peer}": places for peer, _, places in wanted},
        },
        metadata.block_tables.device,
    )
    return Placement(
        num_blocks=1 + len(prefix) + len(new),
        sources=[Source(peer, first, places, on_device[f"places {peer}"]) for peer, first, places in wanted],
        block_tables_np=tables_np,
        block_tables=on_device["block_tables"],
        slots=on_device["slots"],
        my_slots=on_device["my_slots"],
    )
