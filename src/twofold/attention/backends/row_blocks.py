"""The blocks of a step's rows side by side, each row's own: for a kernel that wants all keys of a row made first.

    blocks of row 0   | 7 | 3 |        a copy of the kv_cache     | 7 | 3 | 3 | 5 | 1 |
    blocks of row 1   | 3 | 5 | 1 |    and its block tables    | 0 | 1 |   | 2 | 3 | 4 |

How many there are is found on the device, so that a CUDA graph of it serves other rows too.
"""

import torch
import triton
import triton.language as tl

WIDTH = 4096  # numbers that a program moves


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _gather_kernel(
    kv_cache: tl.tensor,
    block_tables: tl.tensor,
    seq_lens: tl.tensor,
    copy: tl.tensor,
    tables: tl.tensor,
    num_rows: tl.tensor,
    table_stride: tl.tensor,
    page_numbers: tl.constexpr,
    block_size: tl.constexpr,
    rows_pad: tl.constexpr,
    width: tl.constexpr,
) -> None:
    """Grid (blocks of the copy, pieces of a page)."""
    number = tl.program_id(0)
    rows = tl.arange(0, rows_pad)
    counts = tl.cdiv(tl.load(seq_lens + rows, mask=rows < num_rows, other=0), block_size)
    ends = tl.cumsum(counts, 0)
    row = tl.sum((ends <= number).to(tl.int32), 0)  # those that end before it
    if row >= num_rows:
        return
    place = number - tl.sum(tl.where(rows < row, counts, 0), 0)
    if tl.program_id(1) == 0:
        tl.store(tables + row * table_stride + place, number)
    block = tl.load(block_tables + row * table_stride + place).to(tl.int64)
    offsets = tl.program_id(1) * width + tl.arange(0, width)
    inside = offsets < page_numbers
    values = tl.load(kv_cache + block * page_numbers + offsets, mask=inside)
    tl.store(copy + number.to(tl.int64) * page_numbers + offsets, values, mask=inside)


def gather_row_blocks(
    kv_cache: torch.Tensor, block_tables: torch.Tensor, seq_lens: torch.Tensor, num_blocks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of the rows' kv_cache, [num_blocks, block_size, entry_width], and the rows' block tables into it.

    kv_cache [num_all_blocks, block_size, entry_width], block_tables [V, B], seq_lens [V]. The rows have at most
    `num_blocks`.
    """
    block_size, entry_width = kv_cache.shape[1:]
    copy = kv_cache.new_empty(num_blocks, block_size, entry_width)
    tables = torch.zeros_like(block_tables)
    numbers = block_size * entry_width
    _gather_kernel[num_blocks, triton.cdiv(numbers, WIDTH)](
        kv_cache, block_tables, seq_lens, copy, tables, len(seq_lens), block_tables.stride(0),
        page_numbers=numbers, block_size=block_size, rows_pad=triton.next_power_of_2(len(seq_lens)), width=WIDTH,
    )  # fmt: skip
    return copy, tables
