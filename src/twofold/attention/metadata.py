"""A step's rows on this rank, as attention kernels want them."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(slots=True)
class AttentionMetadata:
    """V rows (virtual requests) of T tokens. Row v's queries are the last `query_len` of its `seq_len` keys.

    Tensors on the device have V' rows, with those of the padding, up to N tokens; what they give must be finite.
    """

    num_tokens: int  # T
    query_start_np: NDArray[np.int64]  # [V + 1] row -> its first token
    seq_lens_np: NDArray[np.int64]  # [V] tokens of the request up to the row's end
    block_tables_np: NDArray[np.int32]  # [V, B] row, page of the request -> block
    query_start: torch.Tensor  # [V' + 1] int32
    seq_lens: torch.Tensor  # [V'] int32; 0 for a padding decode
    block_tables: torch.Tensor  # [V', B] int32
    max_query_len: int
    max_seq_len: int
    num_row_blocks: int  # blocks of the other rows of V', each row's own; in a graph the most that there may be
    num_decode_rows: int  # leading rows of V' that have one token each

    def last_token_idx(self) -> torch.Tensor:
        """[V'] row -> its last token."""
        return self.query_start[1:].long() - 1

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
