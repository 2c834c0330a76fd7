"""Rows of one token whose requests begin with the same blocks attend to these blocks once.

Without it, 8 answers to a prompt of 58k tokens read its KV entries 8 times in each step. The method is Hydragen's
(arXiv:2402.05099), also known as cascade attention:

    blocks    row 0   | 7 | 3 | 9 | 4 |          prefix     | 7 | 3 | 9 |       one row with the heads of rows 0 and 2
              row 1   | 5 | 8 |                  suffixes   | 4 |
              row 2   | 7 | 3 | 9 | 6 | 2 |                 | 5 | 8 |
                                                            | 6 | 2 |

The prefix is one row of one token whose key-value heads have as many queries as the rows together, so the kernels are
those of any other row. Then each row attends to its suffix, and both results are merged by log-sum-exp.
"""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from twofold.attention.backends.base import AttentionBackend
from twofold.attention.combine import merge
from twofold.attention.metadata import AttentionMetadata
from twofold.attention.spec import AttentionSpec

MIN_SAVED_TOKENS = 8192  # KV entries that are read less often in a layer: with fewer it costs more than it saves


def largest_shared_prefix(
    block_tables: NDArray[np.int32], seq_lens: NDArray[np.int64], block_size: int
) -> tuple[NDArray[np.int64], int]:
    """The rows, ascending, and the number of their leading blocks that save the most if they are read once.

    That is (rows - 1) * blocks; without any saving there are no rows. Each row keeps at least its last token, and the
    block that it is written to. block_tables [V, B], seq_lens [V].
    """
    nothing = np.empty(0, np.int64), 0
    limits = (seq_lens - 1) // block_size  # [V] blocks before the one of the last token
    num_columns = int(limits.max(initial=0))
    if not num_columns or len(np.unique(block_tables[:, 0])) == len(block_tables):
        return nothing
    # In the order of their bytes, rows that begin alike are neighbours.
    tables = np.ascontiguousarray(block_tables[:, :num_columns])
    order = np.argsort(tables.view(np.dtype((np.void, tables.itemsize * num_columns)))[:, 0])
    tables, limits = tables[order], limits[order]
    same = tables[1:] == tables[:-1]
    # [V - 1] row -> number of leading blocks that the next one has, too
    common = np.where(same.all(1), num_columns, same.argmin(1))
    common = np.minimum(common, np.minimum(limits[1:], limits[:-1]))
    # The largest rectangle below `common`: for each height that occurs, how far it goes back from each place.
    heights, place = np.unique(common)[:, None], np.arange(len(common))
    widths = place - np.maximum.accumulate(np.where(common < heights, place, -1), axis=1)  # [heights, V - 1]
    height, last = np.unravel_index(np.argmax(widths * heights), widths.shape)
    num_blocks, width = int(heights[height, 0]), int(widths[height, last])
    return (np.sort(order[last - width + 1 : last + 2]), num_blocks) if num_blocks > 0 else nothing


def padded_num_rows(num_rows: int) -> int:
    """A GPU's kernels are compiled for each number of rows that share a prefix, so there are few: the powers of 2."""
    return 1 << (num_rows - 1).bit_length()


def attend(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    spec: AttentionSpec,
    metadata: AttentionMetadata,
    backend: AttentionBackend,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `backend.attend` gives; a prefix that rows share is read once."""
    shared = metadata.shared_prefix
    if shared is None or not shared.prefix.max_seq_len or not spec.attends_to_all:
        return backend.attend(query, kv_cache, spec, metadata)
    num_kv_heads, num_rows = spec.num_kv_heads, len(shared.rows)
    heads = query.unflatten(1, (num_kv_heads, -1)).transpose(0, 1)  # [Hk, V', G, D]
    folded = heads.index_select(1, shared.rows).flatten(0, 2)[None]  # [1, Hk * M * G, D]
    of_all = replace(spec, num_heads=spec.num_heads * num_rows, sinks=None)
    prefix_out, prefix_lse = backend.attend(folded, kv_cache, of_all, shared.prefix)
    out, lse = backend.attend(query, kv_cache, spec, shared.suffixes)
    parts = num_kv_heads, num_rows, spec.num_heads // num_kv_heads
    merge_rows(out, lse, shared.rows, prefix_out[0].unflatten(0, parts), prefix_lse[0].unflatten(0, parts))
    return out, lse


def merge_rows(
    out: torch.Tensor, lse: torch.Tensor, rows: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> None:
    """Merges attention over other keys into some rows of out [V', H, Dv] and lse [V', H].

    rows [M], which may repeat the first one; other [Hk, M, G, Dv], other_lse [Hk, M, G].
    """
    if out.is_cuda:
        from twofold.attention import kernels  # Triton is on GPU machines only

        kernels.merge_rows(out, lse, rows, other, other_lse)
        return
    mine = out[rows], lse[rows]
    out[rows], lse[rows] = merge(*mine, other.transpose(0, 1).flatten(1, 2), other_lse.transpose(0, 1).flatten(1, 2))
