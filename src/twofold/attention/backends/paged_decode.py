"""Attention of rows of one token, read from the kv_cache in place: split along the keys, merged by log-sum-exp.

One query reads its whole context, so memory bandwidth is the limit. The whole GPU must read, even for one row, and all
programs must finish together, even if rows have very different lengths. So the keys of the whole batch are cut into
runs of about equal length. Each program attends to one run for all query heads that share its key-value head:

    keys          | row 0: 5000 | row 1: 800 |         row 2: 9000         | row 3: 0 |
    runs          |  0   |  1   |     2      |   3   |   4   |   5   |  6  |            slots 7, 8, ...: nothing to do

The number of slots follows from shapes alone. Each program finds its slot's run from the lengths on the device, so one
CUDA graph serves all lengths and block tables. A row of one run is finished by the program that read it. A second
kernel merges the runs of the other rows.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from twofold.attention.spec import AttentionSpec

MAX_SHARED_MEMORY = 224 * 1024  # bytes of a program
LOG2E = tl.constexpr(math.log2(math.e))  # exponentials are powers of 2 throughout
LN2 = tl.constexpr(math.log(2))


@dataclass(frozen=True, slots=True)
class Tuning:
    """What was chosen by measurement (`benchmarks/gpu_kernels.py --sweep`), on an H200."""

    block_n: int = 64  # keys that a program reads at once
    num_warps: int = 4
    num_stages: int = 3  # blocks of keys on their way at once
    programs: int = 768  # the runs of a batch, over all key-value heads; 132 SMs hold two each
    min_run: int = 64  # keys
    enough: int = 256  # programs; where there are so many rows and heads, rows are cut into runs no shorter than
    long_run: int = 2048  # keys
    shared_memory: int = 192 * 1024  # bytes that the blocks on their way may take


HEADS, LATENTS = Tuning(), Tuning(programs=256)


class PagedDecode:
    """Decode attention. Its scratch memory never moves: run a batch size once before capturing it in a CUDA graph."""

    def __init__(self, tuning: Tuning | None = None) -> None:
        self._tuning = tuning
        self._scratch: dict[tuple[torch.device, int], torch.Tensor] = {}

    def __call__(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        spec: AttentionSpec,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """query [B, H, D], kv_cache [num_blocks, block_size, entry_width], block_tables [B, max_blocks], seq_lens [B].

        Returns out [B, H, Dv] and its log-sum-exp [B, H] in float32, both written where they are given; a row without
        keys gets 0 and -inf.
        """
        num_rows, block_size = len(query), kv_cache.shape[1]
        num_heads, num_kv_heads, dim, v_dim = spec.num_heads, spec.num_kv_heads, spec.qk_head_dim, spec.v_head_dim
        values_in_keys = spec.values_in_keys
        if query.stride(-1) != 1:
            query = query.contiguous()
        if out is None:
            out = query.new_empty(num_rows, num_heads, v_dim)
        if lse is None:
            lse = query.new_empty(num_rows, num_heads, dtype=torch.float32)
        assert out.is_contiguous()
        if not num_rows:
            return out, lse
        keys, values = spec.unpack(kv_cache)  # [num_blocks, block_size, Hk, D or Dv], of the same entries
        assert keys.stride(3) == values.stride(3) == 1
        assert keys.stride()[:2] == values.stride()[:2]

        main_dim, rest_dim = _pieces(dim)
        padded_v_dim = max(16, triton.next_power_of_2(v_dim))
        tuning = self._tuning or (LATENTS if values_in_keys else HEADS)
        assert not values_in_keys or main_dim == v_dim, "the values must be the keys' first power of 2"
        group = num_heads // num_kv_heads
        block_h = max(16, min(triton.next_power_of_2(group), 16384 // padded_v_dim))
        head_blocks = triton.cdiv(group, block_h)
        key_bytes = (main_dim + rest_dim + (0 if values_in_keys else padded_v_dim)) * kv_cache.element_size()
        block_n = max(16, min(tuning.block_n, 1 << (65536 // key_bytes).bit_length() - 1))
        query_bytes = block_h * (main_dim + rest_dim + block_n) * kv_cache.element_size()  # and the weights
        room = min(tuning.shared_memory, MAX_SHARED_MEMORY - query_bytes)
        num_stages = max(1, min(tuning.num_stages, room // (block_n * key_bytes)))
        num_warps = tuning.num_warps * (2 if block_h * padded_v_dim > 4096 and not values_in_keys else 1)

        # At most `budget` runs of a full length, and one shorter run for each row.
        budget = max(1, tuning.programs // (num_kv_heads * head_blocks))
        is_enough = num_rows * num_kv_heads * head_blocks >= tuning.enough
        min_run = max(tuning.long_run if is_enough else tuning.min_run, block_n)
        most_keys = block_tables.shape[1] * block_size
        if spec.sliding_window is not None:
            most_keys = min(most_keys, spec.sliding_window + block_n)
        num_slots = min(num_rows + budget, num_rows * triton.cdiv(most_keys, min_run))
        partial, partial_lse = self._partials(num_slots, num_heads, v_dim, query.device)

        plan = {
            "seq_lens": seq_lens,
            "num_rows": num_rows,
            "budget": budget,
            "min_run": min_run,
            "window": spec.sliding_window or 0,
            "block_n": block_n,
            # Few values, because each is compiled.
            "rows_pad": 32 if num_rows <= 32 else 256 if num_rows <= 256 else triton.next_power_of_2(num_rows),
        }
        if spec.softcap is None:
            scale, cap = spec.scaling * LOG2E.value, 0.0
        else:
            scale, cap = spec.scaling / spec.softcap, spec.softcap * LOG2E.value
        _attend_run[(num_kv_heads * head_blocks, num_slots)](
            query,
            keys,
            block_tables,
            out,
            lse,
            partial,
            partial_lse,
            query.stride(0),
            query.stride(1),
            keys.stride(0),
            block_tables.stride(0),
            lse.stride(0),
            lse.stride(1),
            scale,
            cap,
            **plan,
            softcapped=spec.softcap is not None,
            block_size=block_size,
            token_stride=keys.stride(1),
            key_stride=keys.stride(2),
            value_stride=values.stride(2),
            value_offset=values.storage_offset() - keys.storage_offset(),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_blocks=head_blocks,
            block_h=block_h,
            dim=dim,
            main_dim=main_dim,
            rest_dim=rest_dim,
            v_dim=v_dim,
            padded_v_dim=padded_v_dim,
            values_in_keys=values_in_keys,
            num_warps=num_warps,
            num_stages=num_stages,
        )
        _merge_runs[(num_heads, num_rows)](
            partial,
            partial_lse,
            out,
            lse,
            lse.stride(0),
            lse.stride(1),
            **plan,
            num_heads=num_heads,
            v_dim=v_dim,
            padded_v_dim=padded_v_dim,
            chunk=min(64, triton.next_power_of_2(max(2, budget)), max(2, 8192 // padded_v_dim)),
            num_warps=4,
        )
        return out, lse

    def _partials(
        self, num_slots: int, num_heads: int, v_dim: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs [num_slots, H, Dv] and log-sum-exps [num_slots, H] of runs: one lasting buffer for all layers."""
        size = num_slots * num_heads
        capacity = triton.next_power_of_2(size * (v_dim + 1))
        if (device, capacity) not in self._scratch:
            self._scratch[device, capacity] = torch.empty(capacity, dtype=torch.float32, device=device)
        scratch = self._scratch[device, capacity]
        return scratch[: size * v_dim], scratch[size * v_dim :]


def _pieces(dim: int) -> tuple[int, int]:
    """A head dim as one or two powers of 2 with little padding: 128 → 128, 0; 96 → 64, 32; 576 → 512, 64."""
    padded = max(16, triton.next_power_of_2(dim))
    rest = max(16, triton.next_power_of_2(dim - padded // 2))
    return (padded // 2, rest) if padded // 2 > 16 and padded // 2 + rest < padded else (padded, 0)


@triton.jit  # type: ignore[untyped-decorator]
def _plan(
    seq_lens: tl.tensor,
    num_rows: tl.tensor,
    budget: tl.tensor,
    min_run: tl.tensor,
    window: tl.constexpr,
    block_n: tl.constexpr,
    rows_pad: tl.constexpr,
) -> tl.tuple:
    """Rows, their lengths and their numbers of runs, each [rows_pad]."""
    rows = tl.arange(0, rows_pad)
    lengths = tl.load(seq_lens + rows, mask=rows < num_rows, other=0)
    num_keys = lengths
    if window > 0:
        num_keys -= tl.maximum(lengths - window, 0) // block_n * block_n
    run = tl.maximum(tl.cdiv(tl.sum(num_keys, 0), budget), min_run)
    return rows, lengths, tl.cdiv(num_keys, run)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["table_stride", "lse_row_stride", "lse_head_stride", "num_rows", "budget", "min_run"]
)
def _attend_run(
    query: tl.tensor,
    keys_start: tl.tensor,
    block_tables: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    partial: tl.tensor,
    partial_lse: tl.tensor,
    row_stride: tl.tensor,
    head_stride: tl.tensor,
    block_stride: tl.tensor,
    table_stride: tl.tensor,
    lse_row_stride: tl.tensor,
    lse_head_stride: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    seq_lens: tl.tensor,
    num_rows: tl.tensor,
    budget: tl.tensor,
    min_run: tl.tensor,
    window: tl.constexpr,
    block_n: tl.constexpr,
    rows_pad: tl.constexpr,
    softcapped: tl.constexpr,
    block_size: tl.constexpr,
    token_stride: tl.constexpr,
    key_stride: tl.constexpr,
    value_stride: tl.constexpr,
    value_offset: tl.constexpr,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_blocks: tl.constexpr,
    block_h: tl.constexpr,
    dim: tl.constexpr,
    main_dim: tl.constexpr,
    rest_dim: tl.constexpr,
    v_dim: tl.constexpr,
    padded_v_dim: tl.constexpr,
    values_in_keys: tl.constexpr,
) -> None:
    """Grid (blocks of query heads, slots)."""
    slot = tl.program_id(1)
    rows, lengths, counts = _plan(seq_lens, num_rows, budget, min_run, window, block_n, rows_pad)
    ends = tl.cumsum(counts, 0)
    row = tl.sum((ends <= slot).to(tl.int32), 0)
    if row >= num_rows:
        return
    here = rows == row
    seq_len = tl.sum(tl.where(here, lengths, 0), 0)
    count = tl.sum(tl.where(here, counts, 0), 0)
    run = slot - tl.sum(tl.where(here, ends - counts, 0), 0)

    # Tiles begin at multiples of block_n, so that they lie in one block where a block holds whole ones.
    last = seq_len - 1
    low = tl.maximum(seq_len - window, 0) if window > 0 else 0
    first = low // block_n * block_n
    num_tiles = tl.cdiv(seq_len - first, block_n)
    begin = first + run * num_tiles // count * block_n
    end = first + (run + 1) * num_tiles // count * block_n

    group: tl.constexpr = num_heads // num_kv_heads
    kv_head = tl.program_id(0) // head_blocks
    member = tl.program_id(0) % head_blocks * block_h + tl.arange(0, block_h)
    heads = kv_head * group + member
    d = tl.arange(0, main_dim)
    dv = tl.arange(0, padded_v_dim)
    q_rows = query + row.to(tl.int64) * row_stride + heads[:, None] * head_stride
    q = tl.load(q_rows + d[None, :], mask=(member[:, None] < group) & (d[None, :] < dim), other=0.0)
    if rest_dim > 0:
        d_rest = main_dim + tl.arange(0, rest_dim)
        q_rest = tl.load(q_rows + d_rest[None, :], mask=(member[:, None] < group) & (d_rest[None, :] < dim), other=0.0)

    table = block_tables + row * table_stride
    offsets = tl.arange(0, block_n)
    peak = tl.full([block_h], float("-inf"), tl.float32)
    totals = tl.zeros([block_h, block_n], tl.float32)  # summed at the end: warps need not meet for it
    acc = tl.zeros([block_h, padded_v_dim], tl.float32)
    # Where a block holds whole tiles there is one to look up, else one for each key; always for the next tile,
    # because a copy that waits for its address is not on its way.
    ahead = begin if block_size % block_n == 0 else begin + offsets
    block = tl.load(table + tl.minimum(tl.maximum(ahead, low), last) // block_size)
    for start in range(begin, end, block_n):
        # Where the row has no key its nearest one is read: finite, and in a block that is its own.
        keys = start + offsets
        slots = tl.minimum(tl.maximum(keys, low), last) % block_size
        tokens = keys_start + block.to(tl.int64) * block_stride + slots * token_stride
        ahead += block_n
        block = tl.load(table + tl.minimum(ahead, last) // block_size)
        k_rows = tokens[:, None] + kv_head * key_stride
        if main_dim <= dim:
            k = tl.load(k_rows + d[None, :])
        else:
            k = tl.load(k_rows + d[None, :], mask=d[None, :] < dim, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        if rest_dim > 0:
            if main_dim + rest_dim == dim:
                k_rest = tl.load(k_rows + d_rest[None, :])
            else:
                k_rest = tl.load(k_rows + d_rest[None, :], mask=d_rest[None, :] < dim, other=0.0)
            logits = tl.dot(q_rest, tl.trans(k_rest), logits, input_precision="ieee")
        if values_in_keys:
            v = k
        else:
            v_rows = tokens[:, None] + (value_offset + kv_head * value_stride)
            if padded_v_dim == v_dim:
                v = tl.load(v_rows + dv[None, :])
            else:
                v = tl.load(v_rows + dv[None, :], mask=dv[None, :] < v_dim, other=0.0)
        logits *= scale
        if softcapped:
            logits = cap * (2 * tl.sigmoid(2 * logits) - 1)  # tanh
        visible = keys < seq_len
        if window > 0:
            visible &= keys >= low
        logits = tl.where(visible[None, :], logits, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        weights = tl.exp2(logits - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        totals = totals * shrink[:, None] + weights
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        peak = new_peak

    total = tl.sum(totals, 1)
    mine = member < group
    stored = mine[:, None] & (dv[None, :] < v_dim)
    if count == 1:
        lse_row = lse + row.to(tl.int64) * lse_row_stride
        tl.store(lse_row + heads * lse_head_stride, (peak + tl.log2(total)) * LN2, mask=mine)
        out_rows = (out + row.to(tl.int64) * (num_heads * v_dim)) + heads[:, None] * v_dim
        tl.store(out_rows + dv[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=stored)
    else:
        indices = slot * num_heads + heads
        tl.store(partial + indices[:, None] * v_dim + dv[None, :], acc / total[:, None], mask=stored)
        tl.store(partial_lse + indices, peak + tl.log2(total), mask=mine)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["lse_row_stride", "lse_head_stride", "num_rows", "budget", "min_run"]
)
def _merge_runs(
    partial: tl.tensor,
    partial_lse: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    lse_row_stride: tl.tensor,
    lse_head_stride: tl.tensor,
    seq_lens: tl.tensor,
    num_rows: tl.tensor,
    budget: tl.tensor,
    min_run: tl.tensor,
    window: tl.constexpr,
    block_n: tl.constexpr,
    rows_pad: tl.constexpr,
    num_heads: tl.constexpr,
    v_dim: tl.constexpr,
    padded_v_dim: tl.constexpr,
    chunk: tl.constexpr,
) -> None:
    """Grid (query heads, rows)."""
    head = tl.program_id(0)
    row = tl.program_id(1)
    rows, _, counts = _plan(seq_lens, num_rows, budget, min_run, window, block_n, rows_pad)
    count = tl.sum(tl.where(rows == row, counts, 0), 0)
    if count == 1:  # finished already
        return
    first = tl.sum(tl.where(rows < row, counts, 0), 0)
    dv = tl.arange(0, padded_v_dim)
    peak = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([padded_v_dim], tl.float32)
    for begin in range(0, count, chunk):
        run = begin + tl.arange(0, chunk)
        indices = (first + run) * num_heads + head
        run_lse = tl.load(partial_lse + indices, mask=run < count, other=float("-inf"))
        mask = (run[:, None] < count) & (dv[None, :] < v_dim)
        values = tl.load(partial + indices[:, None] * v_dim + dv[None, :], mask=mask, other=0.0)
        new_peak = tl.maximum(peak, tl.max(run_lse, 0))
        weights = tl.exp2(run_lse - new_peak)
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(weights[:, None] * values, 0)
        peak = new_peak
    # A row without keys has 0 and -inf.
    lse_row = lse + row.to(tl.int64) * lse_row_stride
    tl.store(lse_row + head * lse_head_stride, (peak + tl.log2(total)) * LN2)
    acc = acc / tl.where(total > 0, total, 1.0)
    tl.store(out + (row.to(tl.int64) * num_heads + head) * v_dim + dv, acc.to(out.dtype.element_ty), mask=dv < v_dim)
