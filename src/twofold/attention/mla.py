"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): a KV entry is a latent; heads are computed from it.

    KV entry         | latent: L | RoPE part: R |             this is published, exchanged and stored
    head h's key     | key_weight[h] · latent | RoPE part |   D numbers
    head h's value   | value_weight[h] · latent |             Dv numbers

Rows of a prompt expand the entries of their keys: all of them at once from a copy of their blocks, or in bounded pieces
that are merged by log-sum-exp. A row of one token would expand its whole prefix for one query. So it uses the paper's
absorption: its query is projected into the space of the entries and attends to them in the kv_cache, and the result is
projected by `value_weight`.

`models/transforms/latents.py` makes a model hand over latents.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from twofold.attention import own_blocks, shared_prefix
from twofold.attention.backends.base import AttentionBackend
from twofold.attention.combine import merge
from twofold.attention.metadata import AttentionMetadata
from twofold.attention.own_blocks import OwnBlocks
from twofold.attention.rows import place_row_blocks, row_entries
from twofold.attention.spec import LatentSpec
from twofold.kv.cache import copy_blocks
from twofold.parallel.mesh import Mesh

PIECE_BYTES = 1 << 30  # of heads expanded at once: more pieces to merge take longer, larger ones take memory
MAX_QUERIES_AT_ONCE = 2048  # of a row. Longer rows go in pieces, so that head and tail of a prompt share expanded heads


@dataclass(slots=True)
class CopiedRows:
    """The longer rows over a copy of their blocks. It is made once a forward pass and serves all layers."""

    metadata: AttentionMetadata  # of the step
    rows: AttentionMetadata  # with block tables into the copy
    sources: torch.Tensor  # [num_row_blocks] copied block -> block

    @classmethod
    def of(cls, metadata: AttentionMetadata, block_size: int) -> "CopiedRows":
        rows = metadata.longer_rows()
        sources, tables = place_row_blocks(rows.block_tables, rows.seq_lens, rows.num_row_blocks, block_size)
        return cls(metadata, replace(rows, block_tables=tables), sources)


def attend(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    spec: LatentSpec,
    metadata: AttentionMetadata,
    backend: AttentionBackend,
    copied: CopiedRows | None,
) -> tuple[torch.Tensor, CopiedRows | None]:
    """query [N, H, D], kv_cache [num_blocks, block_size, L + R] → [N, H, Dv].

    `copied` is what the layer before this one returned.
    """
    num_decode_rows = metadata.num_decode_rows
    if num_decode_rows == len(metadata.seq_lens):
        out = query.new_empty(len(query), spec.num_heads, spec.v_head_dim)
    elif _fits_at_once(spec, metadata, kv_cache) and backend.can_capture(spec.expanded, query.dtype, False):
        if copied is None or copied.metadata is not metadata:
            copied = CopiedRows.of(metadata, kv_cache.shape[1])
        entries = expand(copy_blocks(kv_cache, copied.sources), spec)
        out, _ = backend.attend(query, entries, spec.expanded, copied.rows)
    else:
        assert len(metadata.query_start_np), "a graph knows no rows that pieces could be made for"
        out = query.new_empty(len(query), spec.num_heads, spec.v_head_dim)
        out[metadata.num_tokens :] = 0
        for rows in shared_prefixes(metadata, num_decode_rows, kv_cache.shape[1]):
            _attend_pieces(query, kv_cache, spec, metadata, backend, rows, out)
    if num_decode_rows:
        absorbed = absorb(query[:num_decode_rows], spec)
        latents, _ = shared_prefix.attend(absorbed, kv_cache, spec.absorbed, metadata.decode_rows(), backend)
        project_values(latents, spec, out[:num_decode_rows])
    return out, copied


def attend_own(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    spec: LatentSpec,
    own: OwnBlocks,
    num_heads: int,
    backend: AttentionBackend,
    mesh: Mesh,
) -> torch.Tensor:
    """The same in a step of decodes over blocks that are divided over ranks; `num_heads` are those of all ranks."""
    latents, _ = own_blocks.attend(absorb(query, spec), kv_cache, spec.absorbed, own, num_heads, backend, mesh)
    out = query.new_empty(len(query), spec.num_heads, spec.v_head_dim)
    project_values(latents, spec, out)
    return out


def absorb(query: torch.Tensor, spec: LatentSpec) -> torch.Tensor:
    """Queries in the space of the KV entries: [B, H, D] → [B, H, L + R]."""
    q_nope, q_rope = query.split([spec.qk_head_dim - spec.qk_rope_head_dim, spec.qk_rope_head_dim], dim=-1)
    absorbed = query.new_empty(*query.shape[:2], spec.entry_width)
    latent, rope = spec.unpack(absorbed)  # [B, H, 1, L], [B, H, 1, R]
    torch.bmm(q_nope.transpose(0, 1), spec.key_weight, out=latent.squeeze(-2).transpose(0, 1))
    rope.squeeze(-2).copy_(q_rope)
    return absorbed


def project_values(latents: torch.Tensor, spec: LatentSpec, out: torch.Tensor) -> None:
    """Projects averages of latents [B, H, L] to averages of values, and writes them to `out` [B, H, Dv]."""
    torch.bmm(latents.transpose(0, 1), spec.value_weight.mT, out=out.transpose(0, 1))


def expand(entries: torch.Tensor, spec: LatentSpec) -> torch.Tensor:
    """KV entries [..., L + R] as those of the expanded heads [..., H * (D + Dv)], which `spec.expanded` unpacks."""
    latents, k_rope = spec.unpack(entries)
    heads = entries.new_empty(*entries.shape[:-1], spec.expanded.entry_width)
    keys, values = spec.expanded.unpack(heads)
    k_nope = keys[..., : -spec.qk_rope_head_dim]
    keys[..., -spec.qk_rope_head_dim :] = k_rope
    if entries.is_cuda:
        # A product for each head, written in its place: moving the parts would take a GPU longer than the products.
        latents = latents.flatten(0, -2).expand(spec.num_heads, -1, -1)
        for out, weight in ((k_nope, spec.key_weight), (values, spec.value_weight)):
            torch.bmm(latents, weight.mT, out=out.flatten(0, -3).transpose(0, 1))
    else:
        product = F.linear(latents.squeeze(-2), spec.weight).unflatten(-1, (spec.num_heads, -1))
        k_nope.copy_(product[..., : -spec.v_head_dim])
        values.copy_(product[..., -spec.v_head_dim :])
    return heads


def piece_tokens(spec: LatentSpec, itemsize: int) -> int:
    """Number of tokens to expand at once."""
    return max(PIECE_BYTES // (spec.expanded.entry_width * itemsize), 1)


def max_attention_bytes(spec: LatentSpec, num_tokens: int) -> int:
    """Most memory that attention of `num_tokens` queries takes: a piece, its entries, and three outputs in float32."""
    piece = PIECE_BYTES + PIECE_BYTES * spec.entry_width // spec.expanded.entry_width
    return piece + 3 * num_tokens * spec.num_heads * spec.v_head_dim * 4


def shared_prefixes(metadata: AttentionMetadata, first_row: int, block_size: int) -> Iterator[list[int]]:
    """Groups of rows from `first_row` on, in which each row has all blocks of the row before it, in the same places.

    A group is the head and the tail of one prompt. The heads expanded for the tail serve the head, too.
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


def _fits_at_once(spec: LatentSpec, metadata: AttentionMetadata, kv_cache: torch.Tensor) -> bool:
    """Whether the longer rows expand all of their keys at once. In a CUDA graph they must: the host knows no rows."""
    num_keys, is_captured = metadata.num_row_blocks * kv_cache.shape[1], not len(metadata.query_start_np)
    is_short = is_captured or metadata.max_query_len <= MAX_QUERIES_AT_ONCE
    return is_short and num_keys <= piece_tokens(spec, kv_cache.itemsize)


def _attend_pieces(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    spec: LatentSpec,
    metadata: AttentionMetadata,
    backend: AttentionBackend,
    rows: list[int],
    out: torch.Tensor,
) -> None:
    """Attends from rows that share their keys, and writes their part of `out`.

    Of a piece of keys, low to high, queries before low attend to none, queries before high to those up to their own
    position, and later queries to all.
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
        keys, values = spec.expanded.unpack(expand(row_entries(kv_cache, metadata, rows[-1], low, high), spec))
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
                part, part_lse = backend.attend_keys(
                    query[bounds[row] : bounds[row + 1]][mine],
                    keys[:num_keys],
                    values[:num_keys],
                    spec.expanded,
                    causal,
                )
                if low:
                    part, part_lse = merge(so_far[mine], lse[mine], part, part_lse)
                so_far[mine], lse[mine] = part, part_lse
    for row, (so_far, _) in sums.items():
        if seq_lens[row] > step:
            out[bounds[row] : bounds[row + 1]] = so_far
