"""A step's rows on this rank, as attention kernels want them."""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(slots=True)
class AttentionMetadata:
    """V rows (virtual requests) of T tokens. Row v's queries are the last `query_len` of its `seq_len` keys.

    Tensors on the device have V' rows: these and rows of padding, N tokens in all. Attention of padding must be finite.
    """

    num_tokens: int  # T
    query_start_np: NDArray[np.int64]  # [V + 1] row -> its first token
    seq_lens_np: NDArray[np.int64]  # [V] tokens of the request up to the row's end
    block_tables_np: NDArray[np.int32]  # [V, B] row, its request's block -> block of the cache
    query_start: torch.Tensor  # [V' + 1] int32
    seq_lens: torch.Tensor  # [V'] int32; 0 for a padding decode
    block_tables: torch.Tensor  # [V', B] int32
    max_query_len: int
    max_seq_len: int
    num_row_blocks: int  # blocks of the rows of V' after the decode rows, each row's own; in a graph an upper bound
    num_decode_rows: int  # leading rows of V' that have one token each
    shared_prefix: "SharedPrefix | None" = None  # in a step of decodes, where it pays to read it once
    _runs: dict[tuple[int, int, int], int | None] = field(default_factory=dict, init=False, repr=False)
    _decode_rows: "AttentionMetadata | None" = field(default=None, init=False, repr=False)
    _longer_rows: "AttentionMetadata | None" = field(default=None, init=False, repr=False)

    def last_token_idx(self) -> torch.Tensor:
        """[V'] row -> its last token."""
        return self.query_start[1:].long() - 1

    def run_of(self, row: int, begin: int, end: int) -> int | None:
        """The first of the row's blocks `begin` up to `end`, if they are neighbours in the cache. Found once a step."""
        key = row, begin, end
        if key not in self._runs:
            blocks = self.block_tables_np[row, begin:end]
            first = int(blocks[0])
            self._runs[key] = first if bool((blocks == np.arange(first, first + end - begin)).all()) else None
        return self._runs[key]

    def over(self, block_tables_np: NDArray[np.int32], block_tables: torch.Tensor) -> "AttentionMetadata":
        """The same rows with their blocks elsewhere: [V, B], [V', B]."""
        return replace(self, block_tables_np=block_tables_np, block_tables=block_tables, shared_prefix=None)

    def of_last_tokens(self) -> "AttentionMetadata":
        """The same rows with one token each, their last."""
        num_rows, device = len(self.seq_lens), self.query_start.device
        return replace(
            self,
            num_tokens=len(self.seq_lens_np),
            query_start_np=np.arange(len(self.seq_lens_np) + 1),
            query_start=torch.arange(num_rows + 1, dtype=torch.int32, device=device),
            max_query_len=1,
            num_row_blocks=0,
            num_decode_rows=num_rows,
        )

    def decode_rows(self) -> "AttentionMetadata":
        """The leading rows of one token. Made once, so all layers of a step have the same object."""
        if self._decode_rows is None:
            end = self.num_decode_rows
            self._decode_rows = self
            if end < len(self.seq_lens):
                self._decode_rows = replace(
                    self,
                    num_tokens=min(self.num_tokens, end),
                    query_start_np=self.query_start_np[: end + 1],
                    seq_lens_np=self.seq_lens_np[:end],
                    block_tables_np=self.block_tables_np[:end],
                    query_start=self.query_start[: end + 1],
                    seq_lens=self.seq_lens[:end],
                    block_tables=self.block_tables[:end],
                    max_query_len=1,
                    num_row_blocks=0,
                )
        return self._decode_rows

    def longer_rows(self) -> "AttentionMetadata":
        """The rows after the leading rows of one token; their tokens keep their places. Made once, too."""
        if self._longer_rows is None:
            first = self.num_decode_rows
            self._longer_rows = self
            if first:
                self._longer_rows = replace(
                    self,
                    query_start_np=self.query_start_np[first:],
                    seq_lens_np=self.seq_lens_np[first:],
                    block_tables_np=self.block_tables_np[first:],
                    query_start=self.query_start[first:],
                    seq_lens=self.seq_lens[first:],
                    block_tables=self.block_tables[first:],
                    num_decode_rows=0,
                )
        return self._longer_rows


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """What rows of a step of decodes have in common (`shared_prefix.py`), of the step's V' rows."""

    rows: torch.Tensor  # [M] int64, those that share the prefix; repeats of the first may follow
    prefix: AttentionMetadata  # one row of one token, the last of the prefix; of length 0 where no row shares it
    suffixes: AttentionMetadata  # the step's rows; those of `rows` without the prefix
