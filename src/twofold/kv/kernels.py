"""Copies of KV entries and blocks on a GPU at the speed of its memory; PyTorch's indexing reaches a quarter of that."""

import torch
import triton
import triton.language as tl

ENTRY_NUMBERS = 1024  # numbers of each entry that a program copies
NUM_ENTRIES = 4  # entries that a program copies
BLOCK_NUMBERS = 4096  # numbers of a block that a program copies


@triton.jit  # type: ignore[untyped-decorator]
def _scatter_kernel(
    entries: tl.tensor,
    slots: tl.tensor,
    kv_slots: tl.tensor,
    count: tl.tensor,
    entry_width: tl.tensor,
    entry_stride: tl.tensor,
    width: tl.constexpr,
    num_entries: tl.constexpr,
) -> None:
    """Grid (groups of entries, pieces of an entry)."""
    entry = tl.program_id(0) * num_entries + tl.arange(0, num_entries)
    column = tl.program_id(1) * width + tl.arange(0, width)
    inside = (entry < count)[:, None] & (column < entry_width)[None, :]
    slot = tl.load(slots + entry, mask=entry < count, other=0)
    values = tl.load(entries + entry.to(tl.int64)[:, None] * entry_stride + column[None, :], mask=inside)
    tl.store(kv_slots + slot[:, None] * entry_width + column[None, :], values, mask=inside)


def scatter_entries(entries: torch.Tensor, slots: torch.Tensor, kv_slots: torch.Tensor) -> None:
    """kv_slots[slots[i]] = entries[i].

    entries [n, entry_width], slots [n] int64, kv_slots [num_slots, entry_width] contiguous.
    """
    count, entry_width = entries.shape
    width = min(ENTRY_NUMBERS, triton.next_power_of_2(entry_width))
    grid = (triton.cdiv(count, NUM_ENTRIES), triton.cdiv(entry_width, width))
    _scatter_kernel[grid](
        entries, slots, kv_slots, count, entry_width, entries.stride(0), width=width, num_entries=NUM_ENTRIES
    )


@triton.jit  # type: ignore[untyped-decorator]
def _gather_kernel(
    kv_cache: tl.tensor,
    sources: tl.tensor,
    copy: tl.tensor,
    block_numbers: tl.constexpr,
    width: tl.constexpr,
) -> None:
    """Grid (blocks of the copy, pieces of a block)."""
    number = tl.program_id(0).to(tl.int64)
    block = tl.load(sources + number).to(tl.int64)
    if block < 0:
        return
    offsets = tl.program_id(1) * width + tl.arange(0, width)
    inside = offsets < block_numbers
    values = tl.load(kv_cache + block * block_numbers + offsets, mask=inside)
    tl.store(copy + number * block_numbers + offsets, values, mask=inside)


def gather_blocks(kv_cache: torch.Tensor, sources: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """copy[i] = kv_cache[sources[i]], not written where that is -1.

    kv_cache [num_blocks, block_size, entry_width] contiguous, sources [n] → [n, block_size, entry_width], which is
    `out` if that is given, contiguous too.
    """
    copy = kv_cache.new_empty(len(sources), *kv_cache.shape[1:]) if out is None else out
    numbers = kv_cache.shape[1] * kv_cache.shape[2]
    grid = (len(sources), triton.cdiv(numbers, BLOCK_NUMBERS))
    _gather_kernel[grid](kv_cache, sources, copy, block_numbers=numbers, width=BLOCK_NUMBERS)
    return copy
