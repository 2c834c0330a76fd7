"""Merging by log-sum-exp on a GPU in one launch; PyTorch's operations would take a dozen in each layer."""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["lse_row_stride", "lse_head_stride"])  # type: ignore[untyped-decorator]
def _merge_rows_kernel(
    out: tl.tensor,
    lse: tl.tensor,
    rows: tl.tensor,
    other: tl.tensor,
    other_lse: tl.tensor,
    lse_row_stride: tl.tensor,
    lse_head_stride: tl.tensor,
    num_heads: tl.constexpr,
    group: tl.constexpr,
    v_dim: tl.constexpr,
    padded_v_dim: tl.constexpr,
) -> None:
    """Grid (rows that are merged, query heads)."""
    member, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + member)
    if (member > 0) & (row == tl.load(rows)):
        return
    there = (head // group * tl.num_programs(0) + member) * group + head % group
    lse_place = lse + row * lse_row_stride + head * lse_head_stride
    mine, others = tl.load(lse_place), tl.load(other_lse + there)
    lead = tl.where(mine == others, 0.0, others - mine)  # of two empty sets the difference is NaN
    dv = tl.arange(0, padded_v_dim)
    out_places = out + (row * num_heads + head) * v_dim + dv
    a = tl.load(out_places, mask=dv < v_dim).to(tl.float32)
    b = tl.load(other + there.to(tl.int64) * v_dim + dv, mask=dv < v_dim).to(tl.float32)
    tl.store(out_places, (a + (b - a) * tl.sigmoid(lead)).to(out.dtype.element_ty), mask=dv < v_dim)
    tl.store(lse_place, tl.maximum(mine, others) + tl.log(1 + tl.exp(-tl.abs(lead))))


def merge_rows(
    out: torch.Tensor, lse: torch.Tensor, rows: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> None:
    """`attention/shared_prefix.py: merge_rows`."""
    _, num_heads, v_dim = out.shape
    _, num_members, group, _ = other.shape
    assert out.is_contiguous()
    assert other.is_contiguous()
    assert other_lse.is_contiguous()
    _merge_rows_kernel[(num_members, num_heads)](
        out,
        lse,
        rows,
        other,
        other_lse,
        lse.stride(0),
        lse.stride(1),
        num_heads=num_heads,
        group=group,
        v_dim=v_dim,
        padded_v_dim=triton.next_power_of_2(v_dim),
        num_warps=1 if v_dim <= 128 else 4,
    )
