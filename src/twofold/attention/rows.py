"""Which KV entries and blocks a row reads."""

import torch

from twofold.attention.metadata import AttentionMetadata


def row_entries(
    kv_cache: torch.Tensor, metadata: AttentionMetadata, row: int, low: int = 0, high: int | None = None
) -> torch.Tensor:
    """Entries [high - low, entry_width] of the row's tokens `low` up to `high`, by default its last.

    A view where their blocks are neighbours. kv_cache [num_blocks, block_size, entry_width].
    """
    block_size = kv_cache.shape[1]
    if high is None:
        high = int(metadata.seq_lens_np[row])
    begin, end = low // block_size, -(-high // block_size)
    if (first := metadata.run_of(row, begin, end)) is not None:
        entries = kv_cache[first : first + end - begin].flatten(0, 1)
    else:
        entries = kv_cache.index_select(0, metadata.block_tables[row, begin:end]).flatten(0, 1)
    return entries[low - begin * block_size : high - begin * block_size]


def place_row_blocks(
    block_tables: torch.Tensor, seq_lens: torch.Tensor, num_blocks: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places the rows' blocks side by side, for a kernel that needs all keys of a row expanded before it runs.

        blocks of row 0   | 7 | 3 |        sources    | 7 | 3 | 3 | 5 | 1 | -1 | -1 |
        blocks of row 1   | 3 | 5 | 1 |    tables     | 0 | 1 |   | 2 | 3 | 4 |

    block_tables [V, B], seq_lens [V] → sources [num_blocks]: copied block -> block, -1 where the rows have no more; and
    the rows' block tables into the copy, [V, B]. The rows have at most `num_blocks` blocks. How many they have is known
    on the device only, so one CUDA graph serves all steps.
    """
    device, (num_rows, num_columns) = block_tables.device, block_tables.shape
    counts = (seq_lens + block_size - 1) // block_size
    ends = counts.cumsum(0)
    starts = ends - counts  # [V] row -> its first copied block
    number = torch.arange(num_blocks, device=device)
    row = torch.searchsorted(ends, number, right=True)  # [num_blocks] copied block -> row
    some_row = row.clamp(max=num_rows - 1)
    place = (number - starts[some_row]).clamp(max=num_columns - 1)
    sources = torch.where(row < num_rows, block_tables[some_row, place], -1)
    column = torch.arange(num_columns, device=device)
    tables = torch.where(column < counts[:, None], starts[:, None] + column, 0)
    return sources, tables.to(block_tables.dtype)
