"""From the plan of a step to the tensors of one rank's forward pass: index arithmetic, no loop over tokens or rows."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from twofold.attention import shared_prefix
from twofold.attention.metadata import AttentionMetadata, SharedPrefix
from twofold.contract import ScheduledBatch
from twofold.parallel.exchange import ExchangePlan
from twofold.parallel.plan import StepPlan
from twofold.worker.request_states import RequestStates

IntArray = NDArray[np.int64]


@dataclass(slots=True)
class InputBatch:
    """One rank's part of a step. T tokens in V rows, padded to N tokens on every rank; S sampled tokens."""

    plan: StepPlan
    metadata: AttentionMetadata
    exchange: ExchangePlan
    slots_np: IntArray  # [P * N] gathered entry -> slot of the cache, as `exchange` has it on the device
    input_ids: torch.Tensor  # [N]
    position_ids: torch.Tensor  # [N]
    row_request_idx: IntArray  # [V] my row -> request of the step
    row_state_idx: IntArray  # [V] my row -> request state
    row_start: IntArray  # [V] my row -> position of its first token
    sampled_idx: torch.Tensor  # [S] my sampled token -> place of its hidden state; by heads [G * max S] of my node
    sampled_request_idx: IntArray  # [S] my sampled token -> request of the step
    all_sampled_request_idx: IntArray  # [P * max S] gathered sampled token -> request of the step, -1 is padding
    all_sampled_state_idx: torch.Tensor  # [P * max S] gathered sampled token -> request state
    all_sampled_row: torch.Tensor  # [P * max S] gathered sampled token -> row of its rank; of padding any


def prepare(batch: ScheduledBatch, plan: StepPlan, states: RequestStates, rank: int, block_size: int) -> InputBatch:
    """Builds a rank's inputs.

    Padding is rows of the null block: one-token rows without keys in a step of decodes, else one row that attends to
    itself. Its KV entries go to slot 0.
    """
    device, padded = states.last_sampled.device, plan.num_padded_tokens

    # All ranks' tokens: their slots in the cache.
    row_state = batch.state_idx[plan.request_idx]  # [all V] row -> request state
    token_state = row_state[plan.token_row()]  # [all T] token -> request state
    position = plan.token_position()
    slots = np.zeros(plan.num_ranks * padded, np.int64)
    slots[plan.gathered_idx()] = (
        states.block_tables[token_state, position // block_size].astype(np.int64) * block_size + position % block_size
    )

    # My tokens.
    num_tokens = int(plan.num_tokens[rank])
    first = int(plan.num_tokens[:rank].sum())
    mine = slice(first, first + num_tokens)
    my_state, my_position = token_state[mine], position[mine]
    ids = np.zeros(padded, np.int64)
    positions = np.zeros(padded, np.int64)
    ids[:num_tokens] = states.token_ids[my_state, my_position]
    positions[:num_tokens] = my_position
    newest = np.flatnonzero(my_position >= states.num_tokens[my_state])  # known on the device only

    # My rows, and those of the padding.
    rows = plan.rows_of(rank)
    length, seq_lens = plan.length[rows], plan.start[rows] + plan.length[rows]
    query_start = np.concatenate([[0], np.cumsum(length)])
    num_padding = padded - num_tokens
    longer = np.flatnonzero(length > 1)
    if plan.is_decode:
        num_decode_rows, padding_lens = padded, np.zeros(num_padding, np.int64)
        padding_start = num_tokens + np.arange(1, num_padding + 1)
    else:
        num_decode_rows = int(longer[0]) if len(longer) else len(length)
        padding_lens = np.full(min(num_padding, 1), num_padding)
        padding_start = num_tokens + padding_lens
    max_seq_len = int(seq_lens.max(initial=0))
    num_blocks = -(-max(max_seq_len, num_padding) // block_size)
    block_tables = states.block_tables[row_state[rows], :num_blocks]
    all_seq_lens = np.concatenate([seq_lens, padding_lens])
    num_row_blocks = 0 if plan.is_decode else int((-(-all_seq_lens[num_decode_rows:] // block_size)).sum())

    # Sampled tokens. By heads every rank of a node has the same rows, and so the hidden state of each one's token.
    my_sampled = plan.sampled_row[rank][plan.sampled_row[rank] >= 0]
    all_sampled_row = plan.sampled_row.ravel()
    is_sampled, width = all_sampled_row >= 0, plan.sampled_row.shape[1]
    place = np.where(is_sampled, all_sampled_row - np.repeat(plan.row_ptr[:-1], width), 0)  # among its rank's rows
    here = place.reshape(plan.num_nodes, -1)[plan.node_of(rank)] if plan.by_heads else my_sampled - rows.start
    query_start_padded = np.concatenate([query_start, padding_start])
    last_token = query_start_padded[1:][here] - 1

    on_device = to_device(
        {
            "input_ids": ids,
            "position_ids": positions,
            "newest": newest,
            "newest_state": my_state[newest],
            "slots": slots,
            "sampled": last_token if plan.needs_all_hidden_states else here,
            "all_sampled_row": place,
            # Padding writes its token to the state that no request has.
            "all_sampled_state": np.where(is_sampled, row_state[all_sampled_row], states.max_num_seqs),
            "query_start": query_start_padded.astype(np.int32),
            "seq_lens": all_seq_lens.astype(np.int32),
            "block_tables": np.concatenate([block_tables, np.zeros((len(padding_lens), num_blocks), np.int32)]),
        },
        device,
    )
    input_ids = on_device["input_ids"]
    if len(newest):
        input_ids[on_device["newest"]] = states.last_sampled[on_device["newest_state"]]
    metadata = AttentionMetadata(
        num_tokens=num_tokens,
        query_start_np=query_start,
        seq_lens_np=seq_lens,
        block_tables_np=block_tables,
        query_start=on_device["query_start"],
        seq_lens=on_device["seq_lens"],
        block_tables=on_device["block_tables"],
        max_query_len=max(int(length.max(initial=0)), 1 if plan.is_decode else num_padding),
        max_seq_len=max_seq_len,
        num_row_blocks=num_row_blocks,
        num_decode_rows=num_decode_rows,
    )
    if plan.is_decode:
        num_columns = -(-int(plan.start.max() + 1) // block_size)
        tables = states.block_tables[row_state, :num_columns]
        metadata.shared_prefix = find_shared_prefix(metadata, plan, tables, rank, block_size)
    return InputBatch(
        plan=plan,
        metadata=metadata,
        exchange=ExchangePlan(on_device["slots"], plan.defer_exchange, plan.by_heads),
        slots_np=slots,
        input_ids=input_ids,
        position_ids=on_device["position_ids"],
        row_request_idx=plan.request_idx[rows],
        row_state_idx=row_state[rows],
        row_start=plan.start[rows],
        sampled_idx=on_device["sampled"],
        sampled_request_idx=plan.request_idx[my_sampled],
        all_sampled_request_idx=np.where(is_sampled, plan.request_idx[all_sampled_row], -1),
        all_sampled_state_idx=on_device["all_sampled_state"],
        all_sampled_row=on_device["all_sampled_row"],
    )


def find_shared_prefix(
    metadata: AttentionMetadata, plan: StepPlan, all_tables: NDArray[np.int32], rank: int, block_size: int
) -> SharedPrefix | None:
    """The prefix that rows of a step of decodes share, if reading it once pays on any rank.

    Then all ranks have one, since they replay the same CUDA graph. On a rank without such rows it is empty.
    `metadata` has the rank's rows, all_tables [all V, B] the blocks of all ranks' rows. By heads these are the same on
    every rank of a node, so those of its first rank tell all: a row shares nothing with itself.
    """
    row_ptr, all_lens = plan.row_ptr, plan.start + plan.length
    if plan.by_heads:
        firsts = range(0, plan.num_ranks, plan.num_ranks // plan.num_nodes)
        kept = np.concatenate([np.arange(row_ptr[first], row_ptr[first + 1]) for first in firsts])
        row_ptr, rank = np.cumsum([0] + [row_ptr[first + 1] - row_ptr[first] for first in firsts]), plan.node_of(rank)
        all_tables, all_lens = all_tables[kept], all_lens[kept]
    all_rows, num_blocks = shared_prefix.largest_shared_prefix(all_tables, all_lens, block_size)
    bounds = np.searchsorted(all_rows, row_ptr)  # rank -> its first row that shares the prefix
    if (int(np.diff(bounds).max()) - 1) * num_blocks * block_size < shared_prefix.MIN_SAVED_TOKENS:
        return None
    rows = all_rows[bounds[rank] : bounds[rank + 1]] - row_ptr[rank]
    prefix_len = num_blocks * block_size if len(rows) else 0
    prefix_table = all_tables[all_rows[:1], :num_blocks]
    tables, seq_lens = metadata.block_tables_np, metadata.seq_lens_np
    device, num_rows = metadata.seq_lens.device, len(metadata.seq_lens)
    skipped = np.zeros(len(seq_lens), np.int64)  # [V] row -> leading blocks that it does not read by itself
    skipped[rows] = num_blocks
    suffix_lens = seq_lens - skipped * block_size
    max_suffix_len = int(suffix_lens.max(initial=0))
    column = np.arange(-(-max_suffix_len // block_size)) + skipped[:, None]
    suffix_tables = np.zeros((num_rows, column.shape[1]), np.int32)  # with padding
    suffix_tables[: len(tables)] = np.take_along_axis(tables, np.minimum(column, tables.shape[1] - 1), 1)
    rows = rows if len(rows) else np.zeros(1, np.int64)
    num_repeats = 0 if device.type == "cpu" else shared_prefix.padded_num_rows(len(rows)) - len(rows)
    on_device = to_device(
        {
            "rows": np.concatenate([rows, np.repeat(rows[:1], num_repeats)]),
            "prefix_start": np.array([0, 1], np.int32),
            "prefix_len": np.array([prefix_len], np.int32),
            "prefix_table": prefix_table,
            "suffix_lens": np.pad(suffix_lens, (0, num_rows - len(seq_lens))).astype(np.int32),
            "suffix_tables": suffix_tables,
        },
        device,
    )
    return SharedPrefix(
        rows=on_device["rows"],
        prefix=AttentionMetadata(
            num_tokens=1,
            query_start_np=np.array([0, 1]),
            seq_lens_np=np.array([prefix_len]),
            block_tables_np=prefix_table,
            query_start=on_device["prefix_start"],
            seq_lens=on_device["prefix_len"],
            block_tables=on_device["prefix_table"],
            max_query_len=1,
            max_seq_len=prefix_len,
            num_row_blocks=0,
            num_decode_rows=1,
        ),
        suffixes=replace(
            metadata,
            seq_lens_np=suffix_lens,
            block_tables_np=suffix_tables[: len(tables)],
            seq_lens=on_device["suffix_lens"],
            block_tables=on_device["suffix_tables"],
            max_seq_len=max_suffix_len,
        ),
    )


def to_device(arrays: dict[str, NDArray[Any]], device: torch.device) -> dict[str, torch.Tensor]:
    """Makes tensors of the arrays. To an accelerator they are copied together, in one copy that does not block."""
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    ends = np.cumsum([-(-array.nbytes // 64) * 64 for array in arrays.values()]).tolist()  # each aligned
    staged = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)
    numbers = staged.numpy()
    for start, array in zip([0, *ends], arrays.values(), strict=False):
        numbers[start : start + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
    there = staged.to(device, non_blocking=True)
    return {
        name: there[start : start + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for start, (name, array) in zip([0, *ends], arrays.items(), strict=False)
    }
