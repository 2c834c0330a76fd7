"""Products of few rows of x [T, K] and up to three weights [N, K], in one launch (`few_row_linear.py`).

The programs are dealt to the weights one after the other, and each has some rows of its weight:

    | program 0: rows 0-3 of q | 1: rows 4-7 of q | ... | rows 0-3 of kv | ... |

Sums are in float32. No program adds to another's result, so results are the same bits every time.
"""

import torch
import triton
import triton.language as tl

from twofold.models.transforms.few_row_linear import MAX_WEIGHTS, Tuning


@triton.jit  # type: ignore[untyped-decorator]
def _of_mine(first: tl.tensor, second: tl.tensor, third: tl.tensor, start1: tl.tensor, start2: tl.tensor) -> tl.tensor:
    """What belongs to the weight of this program. Programs from `start1` and `start2` on are of the others."""
    program = tl.program_id(0)
    return tl.where(program < start1, first, tl.where(program < start2, second, third))


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _linear_kernel(
    x: tl.tensor,
    weight0: tl.tensor,
    weight1: tl.tensor,
    weight2: tl.tensor,
    out0: tl.tensor,
    out1: tl.tensor,
    out2: tl.tensor,
    num_rows: tl.tensor,
    in_features: tl.tensor,
    x_stride: tl.tensor,
    stride0: tl.tensor,
    stride1: tl.tensor,
    stride2: tl.tensor,
    out_features0: tl.tensor,
    out_features1: tl.tensor,
    out_features2: tl.tensor,
    rows_pad: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    num_blocks: tl.constexpr,
    by_dot: tl.constexpr,
    even: tl.constexpr,
) -> None:
    """Grid: blocks of `block_n` rows of each weight. `even`: these, and blocks of `block_k` inputs, are all full."""
    start1 = tl.cdiv(out_features0, block_n)
    start2 = start1 + tl.cdiv(out_features1, block_n)
    weight = _of_mine(weight0, weight1, weight2, start1, start2)
    out = _of_mine(out0, out1, out2, start1, start2)
    stride = _of_mine(stride0, stride1, stride2, start1, start2)
    out_features = _of_mine(out_features0, out_features1, out_features2, start1, start2)
    first = (tl.program_id(0) - _of_mine(0, start1, start2, start1, start2)) * block_n
    weight += first.to(tl.int64) * stride
    m, n = tl.arange(0, rows_pad), tl.arange(0, block_n)
    if by_dot:
        total = tl.zeros([rows_pad, block_n], tl.float32)
        for start in tl.range(0, in_features, block_k, num_stages=num_blocks):
            k = start + tl.arange(0, block_k)
            ours = weight + n[None, :] * stride + k[:, None]
            if even:
                w = tl.load(ours)
            else:
                inside = (first + n < out_features)[None, :] & (k < in_features)[:, None]
                w = tl.load(ours, mask=inside, other=0.0)
            a = tl.load(
                x + m[:, None] * x_stride + k[None, :],
                mask=(m < num_rows)[:, None] & (k < in_features)[None, :],
                other=0.0,
            )
            total = tl.dot(a, w, total)
    else:
        # Summed over the inputs after the loop only.
        products = tl.zeros([rows_pad, block_n, block_k], tl.float32)
        for start in tl.range(0, in_features, block_k, num_stages=num_blocks):
            k = start + tl.arange(0, block_k)
            ours = weight + n[None, :, None] * stride + k[None, None, :]
            if even:
                w = tl.load(ours, eviction_policy="evict_first")
            else:
                inside = (first + n < out_features)[None, :, None] & (k < in_features)[None, None, :]
                w = tl.load(ours, mask=inside, other=0.0, eviction_policy="evict_first")
            a = tl.load(
                x + m[:, None, None] * x_stride + k[None, None, :],
                mask=(m < num_rows)[:, None, None] & (k < in_features)[None, None, :],
                other=0.0,
            )
            products += a.to(tl.float32) * w.to(tl.float32)
        total = tl.sum(products, 2)
    tl.store(
        out + m[:, None] * out_features + (first + n)[None, :],
        total.to(out.dtype.element_ty),
        mask=(m < num_rows)[:, None] & (first + n < out_features)[None, :],
    )


def launch(x: torch.Tensor, weights: list[torch.Tensor], tuning: Tuning) -> list[torch.Tensor]:
    """x [T, K], weights [N, K] each, at most `MAX_WEIGHTS` → [T, N] each."""
    num_rows, in_features = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    outs = [x.new_empty(num_rows, len(weight)) for weight in weights]
    sizes = [len(weight) for weight in weights]
    padding = MAX_WEIGHTS - len(weights)
    rows_pad = triton.next_power_of_2(num_rows)
    _linear_kernel[(sum(triton.cdiv(size, tuning.block_n) for size in sizes),)](
        x, *weights, *weights[:1] * padding, *outs, *outs[:1] * padding, num_rows, in_features, x.stride(0),
        *(weight.stride(0) for weight in weights), *[0] * padding, *sizes, *[0] * padding,
        rows_pad=max(16, rows_pad) if tuning.by_dot else rows_pad,
        block_n=tuning.block_n, block_k=tuning.block_k, num_blocks=tuning.num_stages, by_dot=tuning.by_dot,
        even=in_features % tuning.block_k == 0 and all(size % tuning.block_n == 0 for size in sizes),
        num_warps=tuning.num_warps,
    )  # fmt: skip
    return outs
