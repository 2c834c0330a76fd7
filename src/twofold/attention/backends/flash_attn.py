"""The backend for CUDA: FlashAttention-4 for rows of several tokens, split-KV decode for rows of one.

FlashAttention-4 reads keys and values where they lie, by block table. A block of 128 tokens is a tile of its kernel and
travels by bulk copies. What it cannot compute (float32, odd heads, older GPUs) goes to the backend that can do
anything, and the log says so once.
"""

import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from twofold.attention.backends.paged_decode import PagedDecode
from twofold.attention.backends.row_blocks import gather_row_blocks
from twofold.attention.backends.sdpa import SDPABackend
from twofold.attention.metadata import AttentionMetadata
from twofold.attention.mla import MAX_QUERIES_AT_ONCE, expand, piece_tokens
from twofold.attention.spec import AttentionSpec, LatentSpec

logger = logging.getLogger(__name__)


class FlashAttnBackend:
    """Attention of a step's rows by the fastest kernels for their kind."""

    name = "flash_attn"

    def __init__(self) -> None:
        self._flash = _load_flash_attn()
        self._decode = PagedDecode()
        self._sdpa = SDPABackend()
        self._serves: dict[tuple[AttentionSpec, torch.dtype], bool] = {}
        self._said: set[str] = set()
        self._step: AttentionMetadata | None = None  # whose longer rows these are:
        self._longer_rows: AttentionMetadata | None = None

    def can_capture(self, spec: AttentionSpec, dtype: torch.dtype, is_decode: bool) -> bool:
        if is_decode:
            return True
        capability = torch.cuda.get_device_capability()
        return self._flash is not None and refusal(dtype, spec, capability) is None

    def attend(
        self, query: torch.Tensor, kv_cache: torch.Tensor, spec: AttentionSpec, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """query [N, H, D], kv_cache [num_blocks, block_size, entry_width] → [N, H, Dv]."""
        ones = metadata.num_decode_rows
        if ones == len(metadata.seq_lens):
            return self._decode(query, kv_cache, spec, metadata.block_tables, metadata.seq_lens)
        # Offsets of the longer rows count the tokens before them too, so their kernel takes all of the queries and
        # leaves room in its output for the other's: no copies.
        out = self._prefill(query, kv_cache, spec, self._longer(metadata))
        if ones:
            tables, seq_lens = metadata.block_tables[:ones], metadata.seq_lens[:ones]
            self._decode(query[:ones], kv_cache, spec, tables, seq_lens, out=out[:ones])
        return out

    def attend_at_once(
        self, query: torch.Tensor, kv_cache: torch.Tensor, spec: LatentSpec, metadata: AttentionMetadata
    ) -> torch.Tensor | None:
        """query [N, H, D], kv_cache [num_blocks, block_size, L + R] → [N, H, Dv]."""
        # Longer rows go in pieces: a head and its tail then share what is expanded. Graphs hold none of them.
        num_keys = metadata.num_row_blocks * kv_cache.shape[1]
        fits = metadata.max_query_len <= MAX_QUERIES_AT_ONCE and num_keys <= piece_tokens(spec, query.itemsize)
        if self._flash is None or not fits or not self._is_served(query, spec):
            return None
        rows = self._longer(metadata)
        copy, tables = gather_row_blocks(kv_cache, rows.block_tables, rows.seq_lens, metadata.num_row_blocks)
        keys, values = expand(copy, spec)
        return self._flash_paged(query, keys, values, spec, replace(rows, block_tables=tables))

    def attend_expanded(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: LatentSpec, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """query [l, H, D], keys [k, H, D], values [k, H, Dv] → out [l, H, Dv], log-sum-exp [l, H]."""
        if self._flash is None or not self._is_served(query, spec):
            return self._sdpa.attend_expanded(query, keys, values, spec, causal)
        out, lse = self._flash(
            query[None], keys[None], values[None], softmax_scale=spec.scaling, causal=causal, return_lse=True
        )
        return out[0], lse[0].T

    def attend_absorbed(
        self, query: torch.Tensor, kv_cache: torch.Tensor, spec: LatentSpec, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """query [B, H, L + R], kv_cache [num_blocks, block_size, L + R] → [B, H, L]."""
        rows = slice(len(query))
        return self._decode(query, kv_cache, spec.absorbed, metadata.block_tables[rows], metadata.seq_lens[rows])

    def _prefill(
        self, query: torch.Tensor, kv_cache: torch.Tensor, spec: AttentionSpec, rows: AttentionMetadata
    ) -> torch.Tensor:
        """→ [N, H, Dv], in which the tokens before the first of `rows` are not written."""
        if self._flash is None or not self._is_served(query, spec):
            return self._sdpa.attend(query, kv_cache, spec, rows)
        return self._flash_paged(query, *spec.unpack(kv_cache), spec, rows)

    def _flash_paged(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        spec: AttentionSpec,
        rows: AttentionMetadata,
    ) -> torch.Tensor:
        """query [N, H, D], keys [num_blocks, block_size, Hk, D], values [..., Dv] → [N, H, Dv]."""
        assert self._flash is not None
        # No max_seqlen_q: it changes nothing on Hopper but that short ones are compiled anew.
        out, _ = self._flash(
            query,
            keys,
            values,
            cu_seqlens_q=rows.query_start,
            seqused_k=rows.seq_lens,
            page_table=rows.block_tables,
            softmax_scale=spec.scaling,
            causal=True,
            window_size=(None if spec.sliding_window is None else spec.sliding_window - 1, None),
            softcap=spec.softcap or 0.0,
            learnable_sink=spec.sinks,
        )
        return out  # type: ignore[no-any-return]

    def _longer(self, metadata: AttentionMetadata) -> AttentionMetadata:
        """The step without its leading rows of one token; the same object for all layers."""
        if self._step is not metadata or self._longer_rows is None:
            first = metadata.num_decode_rows
            self._step, self._longer_rows = metadata, metadata
            if first:
                self._longer_rows = replace(
                    metadata,
                    query_start_np=metadata.query_start_np[first:],
                    seq_lens_np=metadata.seq_lens_np[first:],
                    block_tables_np=metadata.block_tables_np[first:],
                    query_start=metadata.query_start[first:],
                    seq_lens=metadata.seq_lens[first:],
                    block_tables=metadata.block_tables[first:],
                    num_decode_rows=0,
                )
        return self._longer_rows

    def _is_served(self, query: torch.Tensor, spec: AttentionSpec) -> bool:
        key = (spec, query.dtype)
        if key not in self._serves:
            reason = refusal(query.dtype, spec, torch.cuda.get_device_capability(query.device))
            self._serves[key] = reason is None
            if reason and reason not in self._said:
                self._said.add(reason)
                logger.warning("FlashAttention-4 does not serve %s: prefill falls back to PyTorch's attention", reason)
        return self._serves[key]


def refusal(dtype: torch.dtype, spec: AttentionSpec, capability: tuple[int, int]) -> str | None:
    """What keeps FlashAttention-4 from computing a layer over kv_cache on such a GPU."""
    dim, v_dim = spec.qk_head_dim, spec.v_head_dim
    if capability[0] not in (9, 10, 11):
        return f"paged attention on compute capability {capability[0]}.{capability[1]}"
    if dtype not in (torch.bfloat16, torch.float16):
        return str(dtype).removeprefix("torch.")
    # Head dims off a multiple of 16 go through bulk copies only, which need kv_cache as large as a tile.
    fits = v_dim <= dim <= 256 and dim % 16 == v_dim % 16 == 0
    if capability[0] != 9:
        fits = fits and (dim <= 128 or (dim, v_dim) in ((192, 128), (256, 256)))
    return None if fits else f"heads of {dim} and {v_dim}"


def _load_flash_attn() -> Callable[..., Any] | None:
    # It loads compiled kernels from here: not a folder of /tmp that anyone could have made first.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twofold" / "flash_attn"
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(cache))
    warnings.filterwarnings("ignore", message="Argument aux_data")  # of its own compiler, at every kernel
    try:
        from flash_attn.cute import flash_attn_varlen_func
    except ImportError:
        logger.warning("flash-attn-4 is not installed (twofold[cuda]): prefill falls back to PyTorch's attention")
        return None
    return flash_attn_varlen_func  # type: ignore[no-any-return]
