"""Steps of decodes over a cache that is divided by blocks: queries travel, entries stay where they are.

Each rank attends from the queries of all ranks to the blocks that it has, and results are merged by log-sum-exp. An
answer to a prompt of 64k tokens would have to fetch half a gigabyte of entries in each step otherwise.

    my queries ──gather──► everyone's queries ─► attend to my blocks ──gather──► results over all blocks ─► merge mine

By tokens ranks have queries of different rows; by heads of different heads, or all have the same ones.
"""

from dataclasses import dataclass, replace

import torch

from twofold.attention.backends.base import AttentionBackend
from twofold.attention.combine import merge
from twofold.attention.metadata import AttentionMetadata
from twofold.attention.spec import AttentionSpec
from twofold.parallel.mesh import Mesh, gather


@dataclass(slots=True)
class OwnBlocks:
    """A step's decodes as this rank sees them: of each row the tokens in blocks that the rank has."""

    rows: AttentionMetadata  # by tokens the rows of all ranks, each rank's padded to N; by heads the step's N rows
    by_heads: bool
    slots: torch.Tensor  # [P * N] gathered entry -> slot of my share; 0 where another rank keeps it


def attend(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    spec: AttentionSpec,
    own: OwnBlocks,
    num_heads: int,
    backend: AttentionBackend,
    mesh: Mesh,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [N, H, D], kv_cache [places, block_size, entry_width] → [N, H, Dv], and its log-sum-exp [N, H].

    `num_heads` are those of all ranks; all have the same key-value heads.
    """
    n, h = query.shape[:2]
    queries, rows, heads = query, slice(None), slice(None)
    if not own.by_heads:
        queries, rows = gather(mesh, query).flatten(0, 1), slice(mesh.rank * n, (mesh.rank + 1) * n)
    elif h < num_heads:
        queries = gather(mesh, query).transpose(0, 1).flatten(1, 2)
        heads = slice(mesh.rank * h, (mesh.rank + 1) * h)
    whole = replace(spec, num_heads=queries.shape[1], sinks=None)
    parts = [gather(mesh, part)[:, rows, heads] for part in backend.attend(queries, kv_cache, whole, own.rows)]
    outs, lses = parts[0].float(), parts[1]
    out, lse = outs[0], lses[0]
    for rank in range(1, mesh.size):
        out, lse = merge(out, lse, outs[rank], lses[rank])
    return out.to(query.dtype), lse
