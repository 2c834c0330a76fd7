"""Multiply a few tokens by their experts' weights: every weight is read once, and nothing is sorted.

A *pair* is a token and one of the experts that it is routed to. Grouped products need pairs sorted and counted by
expert. For a few pairs that takes longer than the products. Here each program takes a slice of one expert's weight and
looks through all pairs for those of its expert.
"""

import math

import torch
import triton
import triton.language as tl

BLOCK_N, BLOCK_K = 64, 64  # of an expert's weight, that a program holds at once
BLOCK_PAIRS = 16  # of an expert at once, or twice as many if it has more; for the next ones its weight is read again
NUM_WARPS, NUM_STAGES, FEW_STAGES = 4, 6, 4
FEW_FEATURES = 1024  # in fewer than these a program is done before more stages help


@triton.jit  # type: ignore[untyped-decorator]
def _multiply(
    x: tl.tensor,
    columns: tl.tensor,
    out: tl.tensor,
    every: tl.tensor,
    mine: tl.tensor,
    order: tl.tensor,
    count: tl.tensor,
    first: tl.tensor,
    n: tl.tensor,
    in_n: tl.tensor,
    x_stride: tl.tensor,
    in_stride: tl.tensor,
    in_features: tl.constexpr,
    out_features: tl.constexpr,
    pairs_per_row: tl.constexpr,
    block_pairs: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
) -> None:
    """Of the expert's `count` pairs those from `first` on."""
    wanted = first + tl.arange(0, block_pairs)
    chosen = mine[None, :] & (order[None, :] == wanted[:, None])
    pair = tl.sum(tl.where(chosen, every[None, :], 0), 1)
    there = (wanted < count)[:, None]
    rows = x + (pair // pairs_per_row)[:, None] * x_stride
    total = tl.zeros([block_pairs, block_n], tl.float32)
    for start in range(0, in_features, block_k):
        k = start + tl.arange(0, block_k)
        a = tl.load(rows + k[None, :], mask=there & (k < in_features)[None, :], other=0.0)
        b = tl.load(columns + k[:, None] * in_stride, mask=(k < in_features)[:, None] & in_n[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    stored = there & in_n[None, :]
    tl.store(out + pair[:, None] * out_features + n[None, :], total.to(out.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["num_pairs"])  # type: ignore[untyped-decorator]
def _linear_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    expert_ids: tl.tensor,
    out: tl.tensor,
    num_pairs: tl.tensor,
    x_stride: tl.tensor,
    expert_stride: tl.tensor,
    part_stride: tl.tensor,
    out_stride: tl.tensor,
    in_stride: tl.tensor,
    in_features: tl.constexpr,
    out_features: tl.constexpr,
    part_features: tl.constexpr,
    pairs_per_row: tl.constexpr,
    by_pair: tl.constexpr,
    pairs_pad: tl.constexpr,
    block_pairs: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
) -> None:
    """Grid: (slices of out_features, experts), or (slices, pairs) `by_pair`: an expert's first pair serves all."""
    every = tl.arange(0, pairs_pad)
    ids = tl.load(expert_ids + every, mask=every < num_pairs, other=-1)
    expert = tl.program_id(1).to(tl.int64)
    if by_pair:
        expert = tl.load(expert_ids + tl.program_id(1))
        if tl.sum(((ids == expert) & (every < tl.program_id(1))).to(tl.int32), 0) > 0:
            return
    mine = ids == expert
    order = tl.cumsum(mine.to(tl.int32), 0) - 1  # pair of mine -> how many come before it
    count = tl.sum(mine.to(tl.int32), 0)
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    if part_features == out_features:
        rows_of_weight = n * out_stride
    else:
        rows_of_weight = n // part_features * part_stride + n % part_features * out_stride
    columns = weight + expert * expert_stride + rows_of_weight[None, :]
    in_n = n < out_features
    if count <= block_pairs:
        for first in range(0, count, block_pairs):  # once, or never
            _multiply(
                x, columns, out, every, mine, order, count, first, n, in_n, x_stride, in_stride, in_features,
                out_features, pairs_per_row, block_pairs, block_n, block_k,
            )  # fmt: skip
    else:
        for first in range(0, count, 2 * block_pairs):
            _multiply(
                x, columns, out, every, mine, order, count, first, n, in_n, x_stride, in_stride, in_features,
                out_features, pairs_per_row, 2 * block_pairs, block_n, block_k,
            )  # fmt: skip


def _expert_linear(
    x: torch.Tensor, weight: torch.Tensor, expert_ids: torch.Tensor, num_experts: int, is_transposed: bool
) -> torch.Tensor:
    """x [S / n, in], each of its vectors for n pairs; weight [E, out, in] or transposed; expert_ids [S] → [S, out].

    A weight [E, parts, out / parts, in] need not have its parts one after the other.
    """
    if is_transposed:
        weight = weight.transpose(1, 2)
    if weight.dim() == 3:
        weight = weight.unsqueeze(1)
    (num_rows, in_features), num_pairs = x.shape, len(expert_ids)
    part_features, out_features = weight.shape[2], weight.shape[1] * weight.shape[2]
    out = x.new_empty(num_pairs, out_features)
    if x.stride(1) != 1:
        x = x.contiguous()
    pairs_per_row = num_pairs // num_rows
    by_pair = num_pairs < num_experts
    grid = (triton.cdiv(out_features, BLOCK_N), num_pairs if by_pair else num_experts)
    _linear_kernel[grid](
        x, weight, expert_ids, out, num_pairs, x.stride(0), *weight.stride(),
        in_features=in_features, out_features=out_features, part_features=part_features,
        pairs_per_row=pairs_per_row, by_pair=by_pair,
        pairs_pad=max(16, triton.next_power_of_2(num_pairs)), block_pairs=BLOCK_PAIRS,
        block_n=BLOCK_N, block_k=BLOCK_K, num_warps=NUM_WARPS,
        num_stages=NUM_STAGES if in_features >= FEW_FEATURES else FEW_STAGES,
    )  # fmt: skip
    return out


_library = torch.library.Library("twofold", "FRAGMENT")
_library.define(
    "expert_linear(Tensor x, Tensor weight, Tensor expert_ids, int num_experts, bool is_transposed) -> Tensor"
)
_library.impl("expert_linear", _expert_linear, "CUDA")
torch.library.register_fake(
    "twofold::expert_linear",
    lambda x, weight, expert_ids, num_experts, is_transposed: x.new_empty(
        len(expert_ids), weight.shape[2] if is_transposed else math.prod(weight.shape[1:-1])
    ),
    lib=_library,
)
