"""The backend for CPUs: one kernel of ours for all rows of a step, over their blocks wherever they lie.

It computes blocks of logits in float32 that stay in a core's caches (`native/kernels.cpp`). Until it is compiled, and
for what it does not compute, the backend is `SDPABackend`.
"""

import torch

from twofold.attention.backends.sdpa import SDPABackend
from twofold.attention.metadata import AttentionMetadata
from twofold.attention.spec import AttentionSpec
from twofold.native.load import kernels

DTYPES = (torch.float32, torch.bfloat16)


class NativeBackend(SDPABackend):
    """Attention on a CPU."""

    def attend(
        self, query: torch.Tensor, kv_cache: torch.Tensor, spec: AttentionSpec, metadata: AttentionMetadata
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not is_served(query, spec):
            return super().attend(query, kv_cache, spec, metadata)
        keys, values = spec.unpack(kv_cache)
        out, lse = torch.ops.twofold_cpu.attend(
            query if query.stride(-1) == 1 else query.contiguous(),
            keys,
            values,
            metadata.query_start,
            metadata.seq_lens,
            metadata.block_tables,
            len(metadata.seq_lens_np),
            spec.scaling,
            spec.sliding_window or 0,
            spec.softcap or 0.0,
            True,
        )
        return out, lse

    def attend_keys(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: AttentionSpec, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not is_served(query, spec):
            return super().attend_keys(query, keys, values, spec, causal)
        starts = torch.tensor([0, len(query)], dtype=torch.int32)
        lens = torch.tensor([len(keys)], dtype=torch.int32)
        query = query if query.stride(-1) == 1 else query.contiguous()
        tables = torch.zeros(1, 1, dtype=torch.int32)
        out, lse = torch.ops.twofold_cpu.attend(
            query, keys[None], values[None], starts, lens, tables, 1, spec.scaling, 0, 0.0, causal
        )
        return out, lse


def is_served(query: torch.Tensor, spec: AttentionSpec) -> bool:
    """By our kernel."""
    is_whole = spec.qk_head_dim * query.itemsize % 4 == 0  # numbers are multiplied in units of 4 bytes
    return query.is_cpu and query.dtype in DTYPES and is_whole and bool(kernels)
