"""What attention asks of a family of kernels. Sinks and merging are done elsewhere (`attention/combine.py`)."""

from typing import Protocol

import torch

from twofold.attention.metadata import AttentionMetadata
from twofold.attention.spec import AttentionSpec


class AttentionBackend(Protocol):
    """Each call gives the output and its log-sum-exp: natural logarithm, float32, without sinks.

    Where a query has no key, the output is 0 and the log-sum-exp is -inf.
    """

    def can_capture(self, spec: AttentionSpec, dtype: torch.dtype, is_decode: bool) -> bool:
        """Whether `attend` reads rows of this kind on the device only, so that one CUDA graph serves all steps."""

    def attend(
        self, query: torch.Tensor, kv_cache: torch.Tensor, spec: AttentionSpec, metadata: AttentionMetadata
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A step's rows: query [N, H, D], kv_cache [num_blocks, block_size, entry_width] → [N, H, Dv], [N, H].

        The output of tokens that belong to no row is undefined.
        """

    def attend_keys(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: AttentionSpec, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Given keys: query [l, H, D], keys [k, Hk, D], values [k, Hk, Dv] → [l, H, Dv], [l, H].

        Causal: the last query attends to all keys, the one before it to all but the last, and so on. Only the innermost
        dimension is sure to be dense. No window and no softcap apply.
        """
