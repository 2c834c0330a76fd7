"""The backend for CUDA: FlashAttention-4 for rows of several tokens, split-KV decode for rows of one.

FlashAttention-4 reads keys and values from the cache by block table. A block of 128 tokens is one tile of its kernel,
which it loads by bulk copies. Other layers (float32, odd head dims, older GPUs) use the `sdpa` backend, and the log
says so once.
"""

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from twofold.attention.backends.paged_decode import PagedDecode
from twofold.attention.backends.sdpa import SDPABackend
from twofold.attention.metadata import AttentionMetadata
from twofold.attention.spec import AttentionSpec

logger = logging.getLogger(__name__)


class FlashAttnBackend:
    """Attention by the fastest kernel for each kind of row."""

    def __init__(self) -> None:
        self._flash = _load_flash_attn()
        self._decode = PagedDecode()
        self._sdpa = SDPABackend()
        self._serves: dict[tuple[torch.dtype, int, int], bool] = {}  # dtype, D, Dv -> whether FlashAttention-4 does
        self._said: set[str] = set()

    def can_capture(self, spec: AttentionSpec, dtype: torch.dtype, is_decode: bool) -> bool:
        return is_decode or self._is_served(spec, dtype)

    def attend(
        self, query: torch.Tensor, kv_cache: torch.Tensor, spec: AttentionSpec, metadata: AttentionMetadata
    ) -> tuple[torch.Tensor, torch.Tensor]:
        decodes, num_decodes = metadata.decode_rows(), metadata.num_decode_rows
        if decodes is metadata:
            return self._decode(query, kv_cache, spec, metadata.block_tables, metadata.seq_lens)
        # Offsets of the longer rows count the tokens before them. So their kernel gets all queries, and leaves room in
        # its output for that of the decodes: nothing is copied.
        out, lse = self._attend_longer(query, kv_cache, spec, metadata.longer_rows())
        if num_decodes:
            self._decode(
                query[:num_decodes], kv_cache, spec, decodes.block_tables, decodes.seq_lens,
                out=out[:num_decodes], lse=lse[:num_decodes],
            )  # fmt: skip
        return out, lse

    def attend_keys(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: AttentionSpec, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._flash is None or not self._is_served(spec, query.dtype):
            return self._sdpa.attend_keys(query, keys, values, spec, causal)
        out, lse = self._flash(
            query[None], keys[None], values[None], softmax_scale=spec.scaling, causal=causal, return_lse=True
        )
        return out[0], lse[0].T

    def _attend_longer(
        self, query: torch.Tensor, kv_cache: torch.Tensor, spec: AttentionSpec, rows: AttentionMetadata
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """→ [N, H, Dv], [N, H], in which the tokens before the first of `rows` are not written."""
        if self._flash is None or not self._is_served(spec, query.dtype):
            return self._sdpa.attend(query, kv_cache, spec, rows)
        keys, values = spec.unpack(kv_cache)
        # No max_seqlen_q: on Hopper it has no effect, but short ones would be compiled again.
        out, lse = self._flash(
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
            return_lse=True,
        )
        return out, lse.T

    def _is_served(self, spec: AttentionSpec, dtype: torch.dtype) -> bool:
        if self._flash is None:
            return False
        key = (dtype, spec.qk_head_dim, spec.v_head_dim)
        if key not in self._serves:
            reason = refusal(dtype, spec, torch.cuda.get_device_capability())
            self._serves[key] = reason is None
            if reason and reason not in self._said:
                self._said.add(reason)
                logger.warning("FlashAttention-4 does not serve %s: prefill falls back to PyTorch's attention", reason)
        return self._serves[key]


def refusal(dtype: torch.dtype, spec: AttentionSpec, capability: tuple[int, int]) -> str | None:
    """Why FlashAttention-4 cannot compute a layer over the kv_cache on such a GPU; None if it can."""
    dim, v_dim = spec.qk_head_dim, spec.v_head_dim
    if capability[0] not in (9, 10, 11):
        return f"paged attention on compute capability {capability[0]}.{capability[1]}"
    if dtype not in (torch.bfloat16, torch.float16):
        return str(dtype).removeprefix("torch.")
    # Head dims that are no multiple of 16 are loaded by bulk copies only, and these need blocks as large as a tile.
    fits = v_dim <= dim <= 256 and dim % 16 == v_dim % 16 == 0
    if capability[0] != 9:
        fits = fits and (dim <= 128 or (dim, v_dim) in ((192, 128), (256, 256)))
    return None if fits else f"heads of {dim} and {v_dim}"


def _load_flash_attn() -> Callable[..., Any] | None:
    # It loads compiled kernels from here. A folder in /tmp could be made by another user first.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twofold" / "flash_attn"
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(cache))
    warnings.filterwarnings("ignore", message="Argument aux_data")  # its own compiler says it for every kernel
    try:
        from flash_attn.cute import flash_attn_varlen_func
    except ImportError:
        logger.warning(
            "flash-attn-4 is not installed: prefill falls back to PyTorch's attention, which is slower; run: "
            "pip install '.[cuda]' in Twofold's checkout"
        )
        return None
    return flash_attn_varlen_func  # type: ignore[no-any-return]
