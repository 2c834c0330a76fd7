"""From a scheduled batch to the tensors of one rank's forward pass: index arithmetic, no loop over tokens or rows."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from twofold.attention.metadata import AttentionMetadata
from twofold.engine.step import ScheduledBatch
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
    sampled_token_idx: IntArray  # [S] my sampled row -> its token in my tensors
    sampled_request_idx: IntArray  # [S] my sampled row -> request of the step
    all_sampled_request_idx: IntArray  # [P * max S] gathered sampled row -> request of the step, -1 is padding
    is_decode: bool  # all rows of all ranks are of one token each

    def fits_prefill_graph(self, max_num_rows: int) -> bool:
        """Whether every rank's rows, and one of padding, fit into a graph of so many; the same on all ranks."""
        return int(np.diff(self.partition.row_ptr).max()) < max_num_rows


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

    `pad` rounds N up, given the most tokens of any rank and whether all rows are of one token each.

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
    is_decode = bool((part.length == 1).all())
    padded = pad(int(part.num_tokens.max()), is_decode)  # N
    slots = np.zeros(num_ranks * padded, np.int64)
    slots[np.arange(total) + np.repeat(np.arange(num_ranks) * padded - rank_start, part.num_tokens)] = slot

    # My tokens. The newest of a request may be known on the device only.
    num_tokens = int(part.num_tokens[rank])
    mine = slice(int(rank_start[rank]), int(rank_end[rank]))
    my_state, my_position = token_state[mine], position[mine]
    ids = np.zeros(padded, np.int64)
    positions = np.zeros(padded, np.int64)
    ids[:num_tokens] = states.token_ids[my_state, my_position]
    positions[:num_tokens] = my_position
    input_ids = to_device(ids, device)
    on_device = np.flatnonzero(my_position >= states.num_tokens[my_state])
    if len(on_device):
        input_ids[to_device(on_device, device)] = states.last_sampled[to_device(my_state[on_device], device)]

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

    rows = part.rows_of(rank)
    return InputBatch(
        partition=part,
        metadata=_metadata(part, rows, num_tokens, padded, is_decode, state_idx, states, block_size, device),
        exchange=ExchangePlan(to_device(slots, device)),
        input_ids=input_ids,
        position_ids=to_device(positions, device),
        state_idx=state_idx,
        row_request_idx=part.request_idx[rows],
        row_start=part.start[rows],
        sampled_token_idx=row_end[my_sampled_row] - 1 - mine.start,
        sampled_request_idx=part.request_idx[my_sampled_row],
        all_sampled_request_idx=all_sampled,
        is_decode=is_decode,
    )


def _metadata(
    part: Partition,
    rows: slice,
    num_tokens: int,
    padded: int,
    is_decode: bool,
    state_idx: IntArray,
    states: RequestStates,
    block_size: int,
    device: torch.device,
) -> AttentionMetadata:
    length, seq_lens = part.length[rows], part.start[rows] + part.length[rows]
    query_start = np.concatenate([[0], np.cumsum(length)])
    max_seq_len = int(seq_lens.max(initial=0))
    num_padding = padded - num_tokens
    num_blocks = -(-max(max_seq_len, num_padding) // block_size)
    block_tables = states.block_tables[state_idx[part.request_idx[rows]], :num_blocks]
    longer = np.flatnonzero(length > 1)
    # Padding tokens: decode rows without keys, or one row that attends to itself in the null block.
    fill = np.zeros(num_padding, np.int64) if is_decode else np.full(min(num_padding, 1), num_padding)
    device_start = np.concatenate([query_start, num_tokens + np.cumsum(fill + 1 if is_decode else fill)])
    device_tables = np.concatenate([block_tables, np.zeros((len(fill), block_tables.shape[1]), np.int32)])
    return AttentionMetadata(
        num_tokens=num_tokens,
        query_start_np=query_start,
        seq_lens_np=seq_lens,
        block_tables_np=block_tables,
        query_start=to_device(device_start.astype(np.int32), device),
        seq_lens=to_device(np.concatenate([seq_lens, fill]).astype(np.int32), device),
        block_tables=to_device(device_tables, device),
        max_query_len=max(int(length.max(initial=0)), 1 if is_decode else num_padding),
        max_seq_len=max_seq_len,
        num_decode_rows=padded if is_decode else int(longer[0]) if len(longer) else len(length),
    )


def to_device(array: NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """A tensor of the array's numbers; the copy to an accelerator does not wait."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
