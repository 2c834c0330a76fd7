"""Multi-head latent attention: the cache row of a token is its latent, and heads are made of it where they are needed.

    row of a token   | latent: L | rotated: R |               this is published, exchanged and stored
    head h's key     | key_weight[h] · latent | rotated |     D numbers
    head h's value   | value_weight[h] · latent |             Dv numbers

Rows of a prompt expand the latents of their keys: all of them at once, or in bounded pieces that are merged by
log-sum-exp. A row of one token would expand its whole prefix for one query, so it goes the other way: its query moves
into the space of the cache rows, attends to them as they lie in the kv_cache, and what it gets moves out through
`value_weight`.

How a model comes to hand over latents is told in `models/latents.py`.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F

from twofold.attention.metadata import AttentionMetadata
from twofold.attention.rows import merge, row_entries
from twofold.attention.spec import LatentSpec

MAX_QUERIES_AT_ONCE = 8192  # of a row that expands all of its keys at once; a CUDA graph holds none that is longer
PIECE_BYTES = 1 << 30  # of heads expanded at once: more pieces to merge take longer, larger ones take memory


class LatentKernels(Protocol):
    """What latent attention needs of a backend."""

    def attend_at_once(
        self, query: torch.Tensor, kv_cache: torch.Tensor, spec: LatentSpec, metadata: AttentionMetadata
    ) -> torch.Tensor | None:
        """All rows but the leading ones of one token, whose part of the output is left as it is: query [N, H, D], pages
        [num_blocks, block_size, L + R] → [N, H, Dv]; None where that takes too much memory, or no kernel serves."""

    def attend_expanded(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: LatentSpec, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """query [l, H, D], keys [k, H, D], values [k, H, Dv] → out [l, H, Dv], log-sum-exp [l, H] in float32.

        Causal: the last query attends to all keys, the one before it to all but the last, and so on. Only the innermost
        dim is sure to be dense.
        """

    def attend_absorbed(
        self, query: torch.Tensor, kv_cache: torch.Tensor, spec: LatentSpec, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """The first B rows, of one token each.

        query [B, H, L + R], kv_cache [num_blocks, block_size, L + R] → [B, H, L].
        """


def attend(
    query: torch.Tensor, kv_cache: torch.Tensor, spec: LatentSpec, metadata: AttentionMetadata, kernels: LatentKernels
) -> torch.Tensor:
    """query [N, H, D], kv_cache [num_blocks, block_size, L + R] → [N, H, Dv]."""
    num_decode_rows, out = metadata.num_decode_rows, None
    if num_decode_rows < len(metadata.seq_lens):
        out = kernels.attend_at_once(query, kv_cache, spec, metadata)
        assert out is not None or len(metadata.query_start_np), "a graph knows no rows that pieces could be made for"
    if out is None:
        out = query.new_empty(len(query), spec.num_heads, spec.v_head_dim)
        out[metadata.num_tokens :] = 0
        for rows in shared_prefixes(metadata, num_decode_rows, kv_cache.shape[1]):
            _attend_pieces(query, kv_cache, spec, metadata, kernels, rows, out)
    if num_decode_rows:
        absorbed = kernels.attend_absorbed(absorb(query[:num_decode_rows], spec), kv_cache, spec, metadata)
        project_values(absorbed, spec, out[:num_decode_rows])
    return out


def absorb(query: torch.Tensor, spec: LatentSpec) -> torch.Tensor:
    """Queries in the space of the cache rows: [B, H, D] → [B, H, L + R]."""
    straight, rotated = query.split([spec.qk_head_dim - spec.qk_rope_head_dim, spec.qk_rope_head_dim], dim=-1)
    absorbed = query.new_empty(*query.shape[:2], spec.entry_width)
    latent = absorbed[..., : spec.kv_lora_rank].transpose(0, 1)  # [H, B, L]
    torch.bmm(straight.transpose(0, 1), spec.key_weight, out=latent)
    absorbed[..., spec.kv_lora_rank :] = rotated
    return absorbed


def project_values(latents: torch.Tensor, spec: LatentSpec, out: torch.Tensor) -> None:
    """Averages of latents [B, H, L] as averages of values, written to `out` [B, H, Dv]."""
    torch.bmm(latents.transpose(0, 1), spec.value_weight.mT, out=out.transpose(0, 1))


def expand(rows: torch.Tensor, spec: LatentSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Cache rows [..., L + R] as keys [..., H, D] and values [..., H, Dv]."""
    latents, rotated = rows.split([spec.kv_lora_rank, spec.qk_rope_head_dim], dim=-1)
    rotated = rotated.unsqueeze(-2).expand(*rows.shape[:-1], spec.num_heads, -1)
    if not rows.is_cuda:
        heads = F.linear(latents, spec.weight).unflatten(-1, (spec.num_heads, -1))  # [..., H, D - R + Dv]
        straight, values = heads[..., : -spec.v_head_dim], heads[..., -spec.v_head_dim :]
        return torch.cat([straight, rotated], dim=-1), values
    # A product for each head, written where it belongs: to join the parts of keys takes a GPU longer than the products.
    keys = rows.new_empty(*rows.shape[:-1], spec.num_heads, spec.qk_head_dim)
    values = rows.new_empty(*rows.shape[:-1], spec.num_heads, spec.v_head_dim)
    keys[..., -spec.qk_rope_head_dim :] = rotated
    latents = latents.flatten(0, -2).expand(spec.num_heads, -1, -1)
    for out, weight in ((keys[..., : -spec.qk_rope_head_dim], spec.key_weight), (values, spec.value_weight)):
        torch.bmm(latents, weight.mT, out=out.flatten(0, -3).transpose(0, 1))
    return keys, values


def piece_tokens(spec: LatentSpec, itemsize: int) -> int:
    """Tokens whose heads are expanded at once."""
    return max(PIECE_BYTES // (spec.num_heads * (spec.qk_head_dim + spec.v_head_dim) * itemsize), 1)


def max_attention_bytes(spec: LatentSpec, num_tokens: int) -> int:
    """Memory that attention of so many queries takes at most: a piece, and three of their outputs in float32."""
    return PIECE_BYTES + 3 * num_tokens * spec.num_heads * spec.v_head_dim * 4


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
    kv_cache: torch.Tensor,
    spec: LatentSpec,
    metadata: AttentionMetadata,
    kernels: LatentKernels,
    rows: list[int],
    out: torch.Tensor,
) -> None:
    """Rows that share their keys; writes their part of `out`.

    Of a piece of keys, low to high, queries before low see none, those before high up to their own, the others all.
    """
    bounds, seq_lens = metadata.query_start_np.tolist(), metadata.seq_lens_np.tolist()
    total, step = seq_lens[rows[-1]], piece_tokens(spec, query.itemsize)
    sums: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # row -> its output so far, and log-sum-exp
    for row in rows:
        so_far = out[bounds[row] : bounds[row + 1]]
        lse = so_far.new_empty(so_far.shape[:2], dtype=torch.float32)
        sums[row] = (so_far if seq_lens[row] <= step else torch.empty_like(so_far, dtype=torch.float32)), lse
    for low in range(0, total, step):
        high = min(low + step, total)
        keys, values = expand(row_entries(kv_cache, metadata, rows[-1], low, high), spec)
        for row in rows:
            so_far, lse = sums[row]
            end = seq_lens[row]
            start = end - len(so_far)
            split = min(max(high, start), end)
            for first, until, causal in ((max(low, start), split, True), (split, end, False)):
                if first >= until:
                    continue
                num_keys = (until if causal else high) - low
                mine = slice(first - start, until - start)
                part, part_lse = kernels.attend_expanded(
                    query[bounds[row] : bounds[row + 1]][mine], keys[:num_keys], values[:num_keys], spec, causal
                )
                if low:
                    part, part_lse = merge(so_far[mine], lse[mine], part, part_lse)
                so_far[mine], lse[mine] = part, part_lse
    for row, (so_far, _) in sums.items():
        if seq_lens[row] > step:
            out[bounds[row] : bounds[row + 1]] = so_far
