"""Multi-head latent attention: the cache row of a token is its latent, and heads are made of it where they are needed.

    row of a token   | latent: L | rotated: R |               this is published, exchanged and stored
    head h's key     | key_weight[h] · latent | rotated |     D numbers
    head h's value   | value_weight[h] · latent |             Dv numbers

Every family projects, scales and rotates in its own way, but all of them hand the finished latent and rotated part to a
method `expand_kv`, and what that returns to the attention interface. So this method alone is replaced, by one that
returns what it was given: no family's forward is written again, nothing is expanded that attention does not ask for,
and a compiler sees latents flow into the attention op like any keys and values. Before that, `latent_spec` makes sure
of the structure with numbers; a model that only looks like it keeps its expanded heads.

Rows of a prompt expand the latents of their keys, in bounded pieces that are merged by log-sum-exp. A row of one token
would expand its whole prefix for one query, so it goes the other way: its query moves into the space of the cache rows,
attends to them as they lie in the pages, and what it gets moves out through `value_weight`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from twofold.attention.backends.sdpa import merge, row_slots
from twofold.attention.metadata import AttentionMetadata
from twofold.attention.spec import AttentionSpec, LatentSpec

PIECE_TOKENS = 8192  # latents expanded at once
TOLERANCE = 1e-2  # rounding of bfloat16; what is structured otherwise is off by 1


class LatentKernels(Protocol):
    """What latent attention needs of a backend."""

    def attend_expanded(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: LatentSpec, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """query [l, H, D], keys [k, H, D], values [k, H, Dv] → out [l, H, Dv], log-sum-exp [l, H] in float32.

        Causal: the last query attends to all keys, the one before it to all but the last, and so on. Only the innermost
        dim is sure to be dense.
        """

    def attend_absorbed(
        self, query: torch.Tensor, pages: torch.Tensor, spec: LatentSpec, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """The first B rows, of one token each. query [B, H, L + R], pages [num_blocks, block_size, L + R] → [B, H, L]."""


def attend(
    query: torch.Tensor, pages: torch.Tensor, spec: LatentSpec, metadata: AttentionMetadata, kernels: LatentKernels
) -> torch.Tensor:
    """query [T, H, D], pages [num_blocks, block_size, L + R] → [T, H, Dv]."""
    num_decode_rows = metadata.num_decode_rows
    out = query.new_empty(len(query), spec.num_heads, spec.v_head_dim)
    if num_decode_rows:
        absorbed = kernels.attend_absorbed(absorb(query[:num_decode_rows], spec), pages, spec, metadata)
        out[:num_decode_rows] = release(absorbed, spec)
    for rows in shared_prefixes(metadata, num_decode_rows, pages.shape[1]):
        _attend_pieces(query, pages, spec, metadata, kernels, rows, out)
    return out


def absorb(query: torch.Tensor, spec: LatentSpec) -> torch.Tensor:
    """Queries in the space of the cache rows: [B, H, D] → [B, H, L + R]."""
    straight, rotated = query.split([spec.qk_head_dim - spec.qk_rope_head_dim, spec.qk_rope_head_dim], dim=-1)
    latent = torch.bmm(straight.transpose(0, 1), spec.key_weight)  # [H, B, L]
    return torch.cat([latent.transpose(0, 1), rotated], dim=-1)


def release(latents: torch.Tensor, spec: LatentSpec) -> torch.Tensor:
    """Averages of latents as averages of values: [B, H, L] → [B, H, Dv]."""
    return torch.bmm(latents.transpose(0, 1), spec.value_weight.mT).transpose(0, 1)


def expand(rows: torch.Tensor, spec: LatentSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Cache rows [n, L + R] as keys [n, H, D] and values [n, H, Dv]."""
    latents, rotated = rows.split([spec.kv_lora_rank, spec.qk_rope_head_dim], dim=-1)
    heads = F.linear(latents, spec.weight).unflatten(-1, (spec.num_heads, -1))  # [n, H, D - R + Dv]
    straight, values = heads[..., : -spec.v_head_dim], heads[..., -spec.v_head_dim :]
    return torch.cat([straight, rotated[:, None].expand(-1, spec.num_heads, -1)], dim=-1), values


def shared_prefixes(metadata: AttentionMetadata, first_row: int, block_size: int) -> Iterator[list[int]]:
    """Rows from `first_row` on, together as long as each has all blocks of the one before it, in the same places.

    Those are the rows of one prompt, its head and its tail: what is expanded for the tail serves the head.
    """
    tables, seq_lens = metadata.block_tables_np, metadata.seq_lens_np
    rows: list[int] = []
    for row in range(first_row, len(seq_lens)):
        if rows:
            before = rows[-1]
            num_blocks = -(-int(seq_lens[before]) // block_size)
            same = bool((tables[before, :num_blocks] == tables[row, :num_blocks]).all())
            if seq_lens[before] > seq_lens[row] or not same:
                yield rows
                rows = []
        rows.append(row)
    if rows:
        yield rows


def _attend_pieces(
    query: torch.Tensor,
    pages: torch.Tensor,
    spec: LatentSpec,
    metadata: AttentionMetadata,
    kernels: LatentKernels,
    rows: list[int],
    out: torch.Tensor,
) -> None:
    """Rows that share their keys, as far as each has them. Writes their part of `out`.

    A piece of the keys, of which each row's queries see all, some or none:

        keys                    | low ......................... high |
        queries before low                                                see none
        queries from low on     | causal: up to their own position   |
        queries from high on    | all of it                          |
    """
    last = rows[-1]
    total = int(metadata.seq_lens_np[last])
    sums: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # row -> output so far, its log-sum-exp
    for low in range(0, total, PIECE_TOKENS):
        high = min(low + PIECE_TOKENS, total)
        keys, values = expand(row_slots(pages, metadata, last, low, high), spec)
        for row in rows:
            begin, end = int(metadata.query_start_np[row]), int(metadata.query_start_np[row + 1])
            row_end = int(metadata.seq_lens_np[row])
            start = row_end - (end - begin)
            split = min(max(high, start), row_end)
            for first, until, causal in ((max(low, start), split, True), (split, row_end, False)):
                if first >= until:
                    continue
                stop = until - low if causal else high - low
                part = kernels.attend_expanded(
                    query[begin + first - start : begin + until - start], keys[:stop], values[:stop], spec, causal
                )
                _add(sums, row, first - start, until - start, part)
"""
