"""From a scheduled batch to the tensors of one rank's forward pass: index arithmetic, no loop over tokens or rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from twofold.attention.metadata import AttentionMetadata
from twofold.contract import ScheduledBatch
from twofold.parallel.exchange import ExchangePlan
from twofold.parallel.partition import Partition, partition
from twofold.worker.request_states import RequestStates

IntArray = NDArray[np.int64]


@dataclass(slots=True)
class InputBatch:
    """One rank's part of a step, and what it must know of the others'. T tokens of mine, padded to N on every rank."""

    partition: Partition
    metadata: AttentionMetadata
    exchange: ExchangePlan
    input_ids: torch.Tensor  # [N]
    position_ids: torch.Tensor  # [N]
    state_idx: IntArray  # [R] request of the step -> line of RequestStates
    row_request_idx: IntArray  # [V] my row -> request of the step
    row_start: IntArray  # [V] my row -> position of its first token
    sampled_idx: torch.Tensor  # [S] my sampled row -> its place among the hidden states
    sampled_request_idx: IntArray  # [S] my sampled row -> request of the step
    all_sampled_request_idx: IntArray  # [P * max S] gathered sampled row -> request of the step, -1 is padding
    all_sampled_state_idx: torch.Tensor  # [P * max S] gathered sampled row -> line of RequestStates
    is_decode: bool  # all rows of all ranks are of one token each, and each of another request
    needs_all_hidden_states: (
        bool  # hidden states are those of all N tokens, not only of the last one of each row and the padding
    )
    max_num_rows: int  # of any rank, one of padding among them
    max_decode_len: int  # tokens of the longest request of which any rank has a row of one token
    max_row_blocks: int  # of any rank: blocks of its rows, each row's own, and the padding's


def prepare(
    batch: ScheduledBatch,
    states: RequestStates,
    rank: int,
    num_ranks: int,
    policy: str,
    block_size: int,
    pad: Callable[[int, bool], int] = lambda num_tokens, is_decode: num_tokens,
) -> InputBatch:
    """Plans the step for everyone and builds this rank's inputs.

    `pad` rounds N up, given the most tokens of any rank and whether this is a step of decodes.

    Every rank's tokens in the order of ranks, each rank's part padded to N tokens:

        gathered row     0 ............ N | N ............ 2N | ...
        rank             0                | 1                 |
        its rows         v0 v0 v0 v1 pad  | v2 v2 v3 v3 v3    |        a slot for each; padding goes to slot 0
    """
    part = partition(batch, num_ranks, policy)
    state_idx = states.indices(batch.request_ids)
    device = states.last_sampled.device

    # All ranks' tokens: their rows, positions, and slots in the cache.
    total = int(part.length.sum())
    row_end = np.cumsum(part.length)
    token_row = np.repeat(np.arange(len(part.length)), part.length)  # [total] token -> row
    position = np.arange(total) - np.repeat(row_end - part.length - part.start, part.length)
    token_state = state_idx[part.request_idx][token_row]  # [total] token -> line of RequestStates
    slot = states.block_tables[token_state, position // block_size].astype(np.int64) * block_size
    slot += position % block_size
    rank_end = np.cumsum(part.num_tokens)
    rank_start = rank_end - part.num_tokens
    is_decode = len(part.length) == len(batch) and bool((part.length == 1).all())
    padded = pad(int(part.num_tokens.max()), is_decode)  # N
    slots = np.zeros(num_ranks * padded, np.int64)
    slots[np.arange(total) + np.repeat(np.arange(num_ranks) * padded - rank_start, part.num_tokens)] = slot

    # My tokens.
    num_tokens = int(part.num_tokens[rank])
    mine = slice(int(rank_start[rank]), int(rank_end[rank]))
    my_state, my_position = token_state[mine], position[mine]
    ids = np.zeros(padded, np.int64)
    positions = np.zeros(padded, np.int64)
    ids[:num_tokens] = states.token_ids[my_state, my_position]
    positions[:num_tokens] = my_position
    newest = np.flatnonzero(my_position >= states.num_tokens[my_state])  # known on the device only

    # Sampled rows: those that end where their request's scheduled tokens end.
    last = batch.num_computed_tokens + batch.num_scheduled_tokens
    sampled_row = np.flatnonzero(
        (part.start + part.length == last[part.request_idx]) & batch.samples[part.request_idx]
    )  # of all ranks, in their order
    bounds = np.searchsorted(sampled_row, part.row_ptr)  # rank -> its first sampled row
    counts = np.diff(bounds)
    max_sampled = int(counts.max())
    all_sampled = np.full(num_ranks * max_sampled, -1, np.int64)
    all_sampled[np.arange(len(sampled_row)) + np.repeat(np.arange(num_ranks) * max_sampled - bounds[:-1], counts)] = (
        part.request_idx[sampled_row]
    )
    my_sampled_row = sampled_row[bounds[rank] : bounds[rank + 1]]
    in_prompt = batch.num_computed_tokens < states.num_prompt_tokens[state_idx] - 1  # [R]
    needs_all_hidden_states = is_decode or bool((in_prompt & states.wants_prompt_logprobs[state_idx]).any())

    # My rows, and those of the padding tokens: decode rows without keys, or one row that attends to itself in the null
    # block.
    rows = part.rows_of(rank)
    length, seq_lens = part.length[rows], part.start[rows] + part.length[rows]
    query_start = np.concatenate([[0], np.cumsum(length)])
    max_seq_len = int(seq_lens.max(initial=0))
    num_padding = padded - num_tokens
    num_blocks = -(-max(max_seq_len, num_padding) // block_size)
    block_tables = states.block_tables[state_idx[part.request_idx[rows]], :num_blocks]
    longer = np.flatnonzero(length > 1)
    row_blocks = np.concatenate([[0], np.cumsum(-(-(part.start + part.length) // block_size))])  # before each row
    padding_blocks = -(-(padded - part.num_tokens) // block_size)
    num_decode_rows = padded if is_decode else int(longer[0]) if len(longer) else len(length)
    fill = np.zeros(num_padding, np.int64) if is_decode else np.full(min(num_padding, 1), num_padding)
    padding_start = num_tokens + np.cumsum(fill + 1 if is_decode else fill)

    on_device = to_device(
        {
            "input_ids": ids,
            "position_ids": positions,
            "newest": newest,
            "newest_state": my_state[newest],
            "slots": slots,
            "sampled": row_end[my_sampled_row] - 1 - mine.start
            if needs_all_hidden_states
            else my_sampled_row - rows.start,
            # Padding's token goes to the line that no request has.
            "all_sampled_state": np.where(all_sampled >= 0, state_idx[all_sampled], states.max_num_seqs),
            "query_start": np.concatenate([query_start, padding_start]).astype(np.int32),
            "seq_lens": np.concatenate([seq_lens, fill]).astype(np.int32),
            "block_tables": np.concatenate([block_tables, np.zeros((len(fill), num_blocks), np.int32)]),
        },
        device,
    )
    input_ids = on_device["input_ids"]
    if len(newest):
        input_ids[on_device["newest"]] = states.last_sampled[on_device["newest_state"]]
    return InputBatch(
        partition=part,
        metadata=AttentionMetadata(
            num_tokens=num_tokens,
            query_start_np=query_start,
            seq_lens_np=seq_lens,
            block_tables_np=block_tables,
            query_start=on_device["query_start"],
            seq_lens=on_device["seq_lens"],
            block_tables=on_device["block_tables"],
            max_query_len=max(int(length.max(initial=0)), 1 if is_decode else num_padding),
            max_seq_len=max_seq_len,
            num_row_blocks=0
            if is_decode
            else int(row_blocks[rows.stop] - row_blocks[rows.start + num_decode_rows] + padding_blocks[rank]),
            num_decode_rows=num_decode_rows,
        ),
        exchange=ExchangePlan(on_device["slots"], defer_exchange=is_decode),
        input_ids=input_ids,
        position_ids=on_device["position_ids"],
        state_idx=state_idx,
        row_request_idx=part.request_idx[rows],
        row_start=part.start[rows],
        sampled_idx=on_device["sampled"],
        sampled_request_idx=part.request_idx[my_sampled_row],
        all_sampled_request_idx=all_sampled,
        all_sampled_state_idx=on_device["all_sampled_state"],
        is_decode=is_decode,
        needs_all_hidden_states=needs_all_hidden_states,
        max_num_rows=int(np.diff(part.row_ptr).max()) + 1,
        max_decode_len=int((part.start[part.length == 1] + 1).max(initial=0)),
        max_row_blocks=int((np.diff(row_blocks[part.row_ptr]) + padding_blocks).max()),
    )


def to_device(arrays: dict[str, NDArray[Any]], device: torch.device) -> dict[str, torch.Tensor]:
    """Tensors of the arrays' numbers; to an accelerator they travel together, in one copy that does not wait."""
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
