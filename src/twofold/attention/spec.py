"""What one layer's attention computes, as far as it does not change from step to step."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class AttentionSpec:
    """Read off the layer's own call of the attention interface (`models/support.py`), so no family needs code."""

    num_heads: int  # H
    num_kv_heads: int  # Hk
    qk_head_dim: int  # D
    v_head_dim: int  # Dv
    scaling: float  # multiplies q·k
    sliding_window: int | None = None  # keys that a query attends to, itself among them
    softcap: float | None = None  # logits become softcap * tanh(logits / softcap)
    sinks: torch.Tensor | None = None  # [H] logits that take part in the softmax's sum and have no value

    @property
    def row_width(self) -> int:
        """Numbers in a token's cache row: keys of all heads, then values of all heads."""
        return self.num_kv_heads * (self.qk_head_dim + self.v_head_dim)

    def split_row(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of rows [..., row_width] as keys [..., Hk, D] and values [..., Hk, Dv]."""
        keys, values = rows.split(
            [self.num_kv_heads * self.qk_head_dim, self.num_kv_heads * self.v_head_dim], dim=-1
        )
        return (
            keys.unflatten(-1, (self.num_kv_heads, self.qk_head_dim)),
            values.unflatten(-1, (self.num_kv_heads, self.v_head_dim)),
        )
