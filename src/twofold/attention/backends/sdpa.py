"""The backend that runs everywhere: PyTorch's fused attention, row by row, over the row's KV entries.

No mask of [Lq, Lk] is made for a row. Its keys come in two parts, and each part needs no mask:

    keys      | already computed: start | computed now: length |
    query t   | all of them             | those up to t        |      prefix part, then diagonal (causal) part

The kernel returns the logarithm of each softmax's denominator (LSE), by which the parts are merged.
"""

import sys

import torch
import torch.nn.functional as F

from twofold.attention.combine import merge
from twofold.attention.metadata import AttentionMetadata
from twofold.attention.rows import row_entries
from twofold.attention.spec import AttentionSpec

WINDOW_QUERIES = 512  # queries that share one mask of a sliding window
MATMUL_QUERIES = 64  # queries with logits in memory at once
MATMUL_KEYS = range(384, 1025)  # with fewer the products are too small to gain, with more logits leave the caches
EXPLICIT_QUERIES = 128  # the same, where no fused kernel computes the layer


class SDPABackend:
    """Attention with torch.nn.functional's kernels, row by row, on any device."""

    def can_capture(self, spec: AttentionSpec, dtype: torch.dtype, is_decode: bool) -> bool:
        return False

    def attend(
        self, query: torch.Tensor, kv_cache: torch.Tensor, spec: AttentionSpec, metadata: AttentionMetadata
    ) -> tuple[torch.Tensor, torch.Tensor]:
        groups = (spec.num_kv_heads, spec.num_heads // spec.num_kv_heads)
        bounds = metadata.query_start_np.tolist()
        parts = []  # outputs, each [l, H, Dv], and their LSE, each [Hk, G, l]
        for row in range(len(bounds) - 1):
            if not metadata.seq_lens_np[row]:  # it has no key
                count = bounds[row + 1] - bounds[row]
                nothing = query.new_zeros(count, spec.num_heads, spec.v_head_dim)
                parts.append((nothing, query.new_full((*groups, count), -torch.inf, dtype=torch.float32)))
                continue
            if bounds[row + 1] - bounds[row] == 1 and _is_plain(spec, query):
                low = max(0, int(metadata.seq_lens_np[row]) - (spec.sliding_window or sys.maxsize))
                parts.append(_one_query(query[bounds[row]], row_entries(kv_cache, metadata, row, low), spec))
                continue
            keys, values = spec.unpack(row_entries(kv_cache, metadata, row))
            q = query[bounds[row] : bounds[row + 1]].unflatten(1, groups).permute(1, 2, 0, 3)  # [Hk, G, L, D]
            out, lse = attend_row(q, keys.transpose(0, 1), values.transpose(0, 1), spec)
            parts.append((out.permute(2, 0, 1, 3).flatten(1, 2), lse))
        for place, count in ((0, bounds[0]), (len(parts) + 1, len(query) - metadata.num_tokens)):
            if count:  # tokens that belong to none of these rows, and padding
                nothing = query.new_zeros(count, spec.num_heads, spec.v_head_dim)
                parts.insert(place, (nothing, query.new_full((*groups, count), -torch.inf, dtype=torch.float32)))
        outs, lses = zip(*parts, strict=True)
        out, lse = (outs[0], lses[0]) if len(parts) == 1 else (torch.cat(outs), torch.cat(lses, dim=2))
        return out, lse.flatten(0, 1).T

    def attend_keys(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: AttentionSpec, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        groups = (spec.num_kv_heads, spec.num_heads // spec.num_kv_heads)
        q = query.unflatten(1, groups).permute(1, 2, 0, 3)
        attend = _causal if causal else _fused
        out, lse = attend(q, keys.transpose(0, 1), values.transpose(0, 1), spec)
        return out.permute(2, 0, 1, 3).flatten(1, 2), lse.permute(2, 0, 1).flatten(1, 2)


def attend_row(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last L of n tokens attend to all n, causally. q [Hk, G, L, D], keys [Hk, n, D], values [Hk, n, Dv].

    Returns out [Hk, G, L, Dv], LSE [Hk, G, L], as all functions below do.
    """
    length, seq_len = q.shape[2], keys.shape[1]
    if spec.softcap is not None:
        return _explicit(q, keys, values, spec)
    window = spec.sliding_window
    if window is not None and window < seq_len:
        if length == 1:
            return _fused(q, keys[:, -window:], values[:, -window:], spec)
        return _windowed(q, keys, values, spec, window)
    if _serves_matmul(q) and length >= MATMUL_QUERIES and seq_len in MATMUL_KEYS:
        return _by_matmul(q, keys, values, spec)
    if q.device.type == "cpu" and length >= MATMUL_QUERIES:  # the kernel reads each key often
        keys, values = keys.contiguous(), values.contiguous()
    return _causal(q, keys, values, spec)


def _is_plain(spec: AttentionSpec, query: torch.Tensor) -> bool:
    """Whether the CPU's kernel computes the layer from entries as they lie."""
    is_as_wide = spec.qk_head_dim == spec.v_head_dim and not spec.values_in_keys
    return is_as_wide and spec.softcap is None and query.device.type == "cpu"


def _one_query(q: torch.Tensor, entries: torch.Tensor, spec: AttentionSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """A decode: what `attend_row` and `_fused` do, in a third of their operations. q [H, D], entries [n, entry_width].

    Returns out [1, H, Dv], LSE [Hk, G, 1].
    """
    num_heads, dim, first = spec.num_kv_heads, spec.qk_head_dim, entries.storage_offset()
    shape, strides = (1, num_heads, len(entries), dim), (0, 2 * dim, entries.stride(0), 1)
    keys, values = (entries.as_strided(shape, strides, start) for start in (first, first + dim))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.view(1, num_heads, -1, dim), keys, values, scale=spec.scaling
    )
    return out.reshape(1, spec.num_heads, dim), lse[0].unsqueeze(-1)


def _causal(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """The prefix part and the diagonal part."""
    if q.shape[2] == 1:
        return _fused(q, keys, values, spec)
    start = keys.shape[1] - q.shape[2]
    out, lse = _fused(q, keys[:, start:], values[:, start:], spec, causal=True)
    if start:
        out, lse = merge(out, lse, *_fused(q, keys[:, :start], values[:, :start], spec))
    return out, lse


def _serves_matmul(q: torch.Tensor) -> bool:
    return q.device.type == "cpu" and q.dtype == torch.bfloat16


def _by_matmul(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the logits of a few queries of all heads at a time. Its large products are faster than the small ones
    of the fused kernel, as long as the logits stay in a CPU's caches.

    Logits are float32, as within the fused kernel. In bfloat16, a logit of 20 would be off by up to 0.06.
    """
    length, seq_len = q.shape[2], keys.shape[1]
    start, out = seq_len - length, q.new_empty(*q.shape[:3], spec.v_head_dim)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    keys, values = keys.float(), values.contiguous()
    later = torch.ones(MATMUL_QUERIES, MATMUL_QUERIES, dtype=torch.bool).triu(1)
    for begin in range(0, length, MATMUL_QUERIES):
        end = min(begin + MATMUL_QUERIES, length)
        count, high = end - begin, start + end
        queries = q[:, :, begin:end].flatten(1, 2).float().mul_(spec.scaling)  # [Hk, G * count, D]
        logits = torch.bmm(queries, keys[:, :high].mT)
        logits.unflatten(1, (-1, count))[..., -count:].masked_fill_(later[:count, :count], -torch.inf)
        weights, lse_part = _softmax(logits)
        out[:, :, begin:end] = torch.bmm(weights.to(values.dtype), values[:, :high]).unflatten(1, (-1, count))
        lse[:, :, begin:end] = lse_part.unflatten(1, (-1, count))
    return out, lse


def _softmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [..., k], LSE [...]. LSE follows from any key with a weight above 0, because that is exp(logit - LSE)."""
    weights = logits.softmax(-1)
    if not logits.is_cuda and bool(weights[..., 0].amin() > 1e-30):  # the first key nearly always does
        return weights, logits[..., 0] - weights[..., 0].log()
    return weights, logits.amax(-1) - weights.amax(-1).log()


def _windowed(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: AttentionSpec, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of queries, each with the keys that any of its queries attends to, and one small mask."""
    length, seq_len = q.shape[2], keys.shape[1]
    start = seq_len - length
    outs, lses = [], []
    for begin in range(0, length, WINDOW_QUERIES):
        end = min(begin + WINDOW_QUERIES, length)
        low, high = max(0, start + begin - window + 1), start + end
        bias = torch.zeros(end - begin, high - low, dtype=q.dtype, device=q.device)
        bias.masked_fill_(~_visible(start + begin, end - begin, low, high, window, q.device), -torch.inf)
        out, lse = _fused(q[:, :, begin:end], keys[:, low:high], values[:, low:high], spec, bias=bias)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _visible(first: int, count: int, low: int, high: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which keys low..high each of `count` queries from position `first` attends to: [count, high - low] bool."""
    distance = torch.arange(first, first + count, device=device)[:, None] - torch.arange(low, high, device=device)
    return (distance >= 0) & (distance < window) if window is not None else distance >= 0


def _explicit(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the logits of a few queries at a time, for what no fused kernel computes (softcap)."""
    length, seq_len = q.shape[2], keys.shape[1]
    start = seq_len - length
    outs, lses = [], []
    for begin in range(0, length, EXPLICIT_QUERIES):
        end = min(begin + EXPLICIT_QUERIES, length)
        low, high = max(0, start + begin - (spec.sliding_window or seq_len) + 1), start + end
        logits = (q[:, :, begin:end] @ keys[:, None, low:high].mT).float() * spec.scaling  # [Hk, G, l, k]
        if spec.softcap is not None:
            logits = spec.softcap * torch.tanh(logits / spec.softcap)
        visible = _visible(start + begin, end - begin, low, high, spec.sliding_window, q.device)
        weights, lse = _softmax(logits.masked_fill_(~visible, -torch.inf))
        outs.append(weights.to(values.dtype) @ values[:, None, low:high])
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _fused(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    spec: AttentionSpec,
    causal: bool = False,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One fused kernel. q [Hk, G, L, D], keys [Hk, k, D], values [Hk, k, Dv], bias [L, k] → out, LSE [Hk, G, L]."""
    _, num_groups, length, _ = q.shape
    folded = length == 1 or not (causal or bias is not None)
    if folded:  # queries of a group attend to the same keys: they count as more queries of one head
        q = q.flatten(1, 2)[None]
        keys, values = keys[None], values[None]
    else:
        keys = keys[:, None].expand(-1, num_groups, -1, -1)
        values = values[:, None].expand(-1, num_groups, -1, -1)
    if q.device.type == "cpu":
        # The CPU kernel needs values as wide as keys.
        if spec.values_in_keys:
            values = keys
        elif missing := keys.shape[-1] - values.shape[-1]:
            values = F.pad(values, (0, max(missing, 0)))
            q, keys = (F.pad(x, (0, max(-missing, 0))) for x in (q, keys))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, keys, values, 0.0, causal, attn_mask=None if bias is None else bias[None, None], scale=spec.scaling
        )
    else:
        if bias is not None:  # the kernel needs each row of the bias aligned to 16 bytes
            width = bias.shape[-1]
            bias = F.pad(bias, (0, -width % 8))[:, :width].expand(*q.shape[:2], -1, -1)
        out, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, keys, values, bias, True, 0.0, causal, scale=spec.scaling
        )
        lse = lse[..., : q.shape[2]]
    out = out[..., : spec.v_head_dim]
    if folded:
        return out[0].unflatten(1, (num_groups, length)), lse[0].unflatten(1, (num_groups, length))
    return out, lse
