"""What every backend needs for one row: its keys out of the kv_cache, and one answer out of two sets of keys."""

import torch

from twofold.attention.metadata import AttentionMetadata


def row_entries(
    kv_cache: torch.Tensor, metadata: AttentionMetadata, row: int, low: int = 0, high: int | None = None
) -> torch.Tensor:
    """A virtual request's keys, from `low` up to `high`, its last by default: cache rows [high - low, entry_width].

    They are a view where their blocks are neighbours.
    """
    block_size = kv_cache.shape[1]
    if high is None:
        high = int(metadata.seq_lens_np[row])
    begin, end = low // block_size, -(-high // block_size)
    blocks = metadata.block_tables_np[row, begin:end]
    first = int(blocks[0])
    if int(blocks[-1]) - first == end - begin - 1 and bool((blocks[1:] - blocks[:-1] == 1).all()):
        slots = kv_cache[first : first + end - begin].flatten(0, 1)
    else:
        slots = kv_cache.index_select(0, metadata.block_tables[row, begin:end]).flatten(0, 1)
    return slots[low - begin * block_size : high - begin * block_size]


def merge(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of keys. out [..., L, Dv], lse [..., L]."""
    share = torch.sigmoid(other_lse - lse)[..., None]
    return torch.lerp(out.float(), other.float(), share).to(out.dtype), torch.logaddexp(lse, other_lse)
