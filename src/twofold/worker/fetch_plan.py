"""What a rank fetches in a step where each rank keeps a share of the KV cache: index arithmetic over blocks."""

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from twofold.contract import ScheduledBatch
from twofold.kv.sharded import owner_of, place_of
from twofold.parallel.fetch_entries import FetchPlan, Placement, Source
from twofold.parallel.plan import StepPlan
from twofold.worker.input_batch import InputBatch, to_device

IntArray = NDArray[np.int64]


def plan_fetch(
    scheduled: ScheduledBatch, batch: InputBatch, rank: int, block_size: int, num_blocks: int, kinds: Collection[bool]
) -> FetchPlan:
    """`batch` is the rank's part of the step, `num_blocks` of the cache; `kinds`: whether layers are divided by heads.

    PCP=2 example: rank 0 has rows of a request with blocks 5, 6, 7, 8; 5 and half of 6 were computed before

        by heads       workspace  | null | 5 | 6 | 7 | 8 |      of rank 1's heads: 5 and 6 are fetched
        by blocks      workspace  | null | 5 | 6 | 7 | 8 |      whole: 5 is rank 0's own, 6 is rank 1's
    """
    prefix, new = _blocks_of_rows(scheduled, batch.plan, batch.metadata.block_tables_np, rank, block_size)
    fetches = bool((scheduled.num_computed_tokens > 0).any())
    placed = {by_heads: _place(batch, prefix, new, rank, block_size, num_blocks, by_heads) for by_heads in set(kinds)}
    return FetchPlan(fetches, by_heads=placed.get(True), by_blocks=placed.get(False))


def _blocks_of_rows(
    scheduled: ScheduledBatch, plan: StepPlan, block_tables: NDArray[np.int32], rank: int, block_size: int
) -> tuple[IntArray, IntArray]:
    """The blocks that the rank's rows attend to: those with entries of earlier steps, and those without."""
    rows, column = plan.rows_of(rank), np.arange(block_tables.shape[1])
    ends = plan.start[rows] + plan.length[rows]
    computed = scheduled.num_computed_tokens[plan.request_idx[rows]]
    used, before = (
        np.unique(block_tables[column < -(-lens[:, None] // block_size)]).astype(np.int64) for lens in (ends, computed)
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
    my_slots = batch.slots_np
    if not by_heads:
        is_mine = owner_of(block, num_ranks) == rank
        my_slots = np.where(is_mine & (block > 0), place_of(block, num_ranks) * block_size + offset, 0)

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
