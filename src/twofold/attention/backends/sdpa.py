"""The backend that runs everywhere: PyTorch's fused attention over each row's gathered kv_cache, merged by log-sum-exp.

No mask of [Lq, Lk] is made for a row. Its keys come in two parts, and each part needs no mask:

    keys      | already computed: start | computed now: length |
    query t   | all of them             | those up to t        |      prefix part, then diagonal (causal) part

Logits of both parts meet in the softmax's denominator, which the kernel returns as its logarithm (LSE); that is also
where attention sinks enter, once for the whole row.
"""

import torch
import torch.nn.functional as F

from twofold.attention.metadata import AttentionMetadata
from twofold.attention.rows import merge, row_entries
from twofold.attention.spec import AttentionSpec, LatentSpec

WINDOW_QUERIES = 512  # queries that share one mask of a sliding window
MATMUL_QUERIES = 64  # queries whose logits exist at once
MATMUL_KEYS = range(384, 1025)  # with fewer the products are too small to gain, with more logits leave the caches
EXPLICIT_QUERIES = 128  # queries whose logits are materialised at once where no fused kernel serves


class SDPABackend:
    """Attention with torch.nn.functional's kernels, row by row, on any device."""

    def can_capture(self, spec: AttentionSpec, dtype: torch.dtype, is_decode: bool) -> bool:
        return False

    def attend(
        self, query: torch.Tensor, kv_cache: torch.Tensor, spec: AttentionSpec, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """query [N, H, D], kv_cache [num_blocks, block_size, entry_width] → [N, H, Dv]."""
        out = query.new_empty(len(query), spec.num_heads, spec.v_head_dim)
        out[metadata.num_tokens :] = 0
        groups = (spec.num_kv_heads, spec.num_heads // spec.num_kv_heads)
        bounds = metadata.query_start_np.tolist()
        for row in range(len(bounds) - 1):
            tokens = slice(bounds[row], bounds[row + 1])
            keys, values = spec.unpack(row_entries(kv_cache, metadata, row))
            q = query[tokens].unflatten(1, groups).permute(1, 2, 0, 3)  # [Hk, G, L, D]
            out_row = attend_row(q, keys.transpose(0, 1), values.transpose(0, 1), spec)  # [Hk, G, L, Dv]
            out[tokens].unflatten(1, groups).copy_(out_row.permute(2, 0, 1, 3))
        return out

    def attend_at_once(
        self, query: torch.Tensor, kv_cache: torch.Tensor, spec: LatentSpec, metadata: AttentionMetadata
    ) -> torch.Tensor | None:
        return None  # nothing is gained where rows run one by one

    def attend_expanded(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: LatentSpec, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """query [l, H, D], keys [k, H, D], values [k, H, Dv] → out [l, H, Dv], log-sum-exp [l, H]."""
        q, keys, values = query.transpose(0, 1)[:, None], keys.transpose(0, 1), values.transpose(0, 1)
        out, lse = _causal(q, keys, values, spec) if causal else _fused(q, keys, values, spec)
        return out[:, 0].transpose(0, 1), lse[:, 0].transpose(0, 1)

    def attend_absorbed(
        self, query: torch.Tensor, kv_cache: torch.Tensor, spec: LatentSpec, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """query [B, H, L + R], kv_cache [num_blocks, block_size, L + R] → [B, H, L]."""
        out = query.new_zeros(*query.shape[:2], spec.kv_lora_rank)  # padding stays 0
        for row in range(min(len(query), len(metadata.seq_lens_np))):
            slots = row_entries(kv_cache, metadata, row)[None]
            out[row] = attend_row(query[row][None, :, None], slots, slots, spec.absorbed)[0, :, 0]
        return out


def attend_row(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """The last L of n tokens attend to all n, causally. q [Hk, G, L, D], keys [Hk, n, D], values [Hk, n, Dv]."""
    length, seq_len = q.shape[2], keys.shape[1]
    if spec.softcap is not None:
        return _explicit(q, keys, values, spec)
    window = spec.sliding_window
    if window is not None and window < seq_len:
        if length == 1:
            out, lse = _fused(q, keys[:, -window:], values[:, -window:], spec)
        else:
            out, lse = _windowed(q, keys, values, spec, window)
    elif _serves_matmul(q, spec) and length >= MATMUL_QUERIES and seq_len in MATMUL_KEYS:
        return _by_matmul(q, keys, values, spec)
    else:
        if q.device.type == "cpu" and length >= MATMUL_QUERIES:  # the kernel reads each key often
            keys, values = keys.contiguous(), values.contiguous()
        out, lse = _causal(q, keys, values, spec)
    if spec.sinks is not None:
        # A sink adds exp(sink) to the denominator: exp(lse) / (exp(lse) + exp(sink)).
        share = torch.sigmoid(lse - spec.sinks.float().view(*q.shape[:2], 1))
        out = out * share[..., None].to(out.dtype)
    return out


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


def _serves_matmul(q: torch.Tensor, spec: AttentionSpec) -> bool:
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and spec.sinks is None


def _by_matmul(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """Logits in the open, a few queries of all heads at a time: products of one large shape beat the fused kernel's
    small ones as long as the logits stay in a CPU's caches.

    Logits are float32, as they are within the fused kernel: rounded to bfloat16, one of 20 would be off by 0.06.
    """
    length, seq_len = q.shape[2], keys.shape[1]
    start, out = seq_len - length, q.new_empty(*q.shape[:3], spec.v_head_dim)
    keys, values = keys.float(), values.contiguous()
    later = torch.ones(MATMUL_QUERIES, MATMUL_QUERIES, dtype=torch.bool).triu(1)
    for begin in range(0, length, MATMUL_QUERIES):
        end = min(begin + MATMUL_QUERIES, length)
        count, high = end - begin, start + end
        queries = q[:, :, begin:end].flatten(1, 2).float().mul_(spec.scaling)  # [Hk, G * count, D]
        logits = torch.bmm(queries, keys[:, :high].mT)
        logits.unflatten(1, (-1, count))[..., -count:].masked_fill_(later[:count, :count], -torch.inf)
        weights = logits.softmax(-1).to(values.dtype)
        out[:, :, begin:end] = torch.bmm(weights, values[:, :high]).unflatten(1, (-1, count))
    return out


def _windowed(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: AttentionSpec, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of queries, each with the keys that any of them sees and one small mask."""
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


def _explicit(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """Logits in the open, a few queries at a time: for what no fused kernel computes (softcap)."""
    length, seq_len = q.shape[2], keys.shape[1]
    start, outs = seq_len - length, []
    for begin in range(0, length, EXPLICIT_QUERIES):
        end = min(begin + EXPLICIT_QUERIES, length)
        low, high = max(0, start + begin - (spec.sliding_window or seq_len) + 1), start + end
        logits = (q[:, :, begin:end] @ keys[:, None, low:high].mT).float() * spec.scaling  # [Hk, G, l, k]
        if spec.softcap is not None:
            logits = spec.softcap * torch.tanh(logits / spec.softcap)
        visible = _visible(start + begin, end - begin, low, high, spec.sliding_window, q.device)
        logits = logits.masked_fill_(~visible, -torch.inf)
        if spec.sinks is not None:
            sinks = spec.sinks.float().view(*q.shape[:2], 1, 1).expand(*logits.shape[:3], 1)
            logits = torch.cat([logits, sinks], dim=-1)
        weights = logits.softmax(-1)[..., : high - low].to(values.dtype)
        outs.append(weights @ values[:, None, low:high])
    return torch.cat(outs, dim=2)


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
    if folded:  # queries of a group see the same keys: they are more queries of one head
        q = q.flatten(1, 2)[None]
        keys, values = keys[None], values[None]
    else:
        keys = keys[:, None].expand(-1, num_groups, -1, -1)
        values = values[:, None].expand(-1, num_groups, -1, -1)
    if q.device.type == "cpu":
        # The CPU kernel wants values as wide as keys.
        if missing := keys.shape[-1] - values.shape[-1]:
            values = F.pad(values, (0, max(missing, 0)))
            q, keys = (F.pad(x, (0, max(-missing, 0))) for x in (q, keys))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, keys, values, 0.0, causal, attn_mask=None if bias is None else bias[None, None], scale=spec.scaling
        )
    else:
        if bias is not None:  # the kernel wants rows of the bias aligned to 16 bytes
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
