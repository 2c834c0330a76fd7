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
    def entry_width(self) -> int:
        """Numbers in a token's cache row: keys of all heads, then values of all heads."""
        return self.num_kv_heads * (self.qk_head_dim + self.v_head_dim)

    def unpack(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of rows [..., entry_width] as keys [..., Hk, D] and values [..., Hk, Dv]."""
        keys, values = rows.split([self.num_kv_heads * self.qk_head_dim, self.num_kv_heads * self.v_head_dim], dim=-1)
        return (
            keys.unflatten(-1, (self.num_kv_heads, self.qk_head_dim)),
            values.unflatten(-1, (self.num_kv_heads, self.v_head_dim)),
        )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LatentSpec(AttentionSpec):
    """Multi-head latent attention (`attention/mla.py`): keys and values of all heads are linear in a token's latent.

    What it inherits describes attention over the expanded heads, H of them for keys and values too. Only what they are
    expanded from is kept.
    """

    kv_lora_rank: int  # L
    qk_rope_head_dim: int  # R: the last R numbers of a key are rotated, and the same for every head
    weight: torch.Tensor  # [H * (D - R + Dv), L] latent -> for each head its key up to those R, then its value

    @property
    def entry_width(self) -> int:
        """Numbers in a token's cache row: its latent, then the rotated part of its keys."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def unpack(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of rows [..., entry_width] as latents [..., 1, L] and rotated parts [..., 1, R]."""
        latents, rotated = rows.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        return latents.unsqueeze(-2), rotated.unsqueeze(-2)

    @property
    def absorbed(self) -> AttentionSpec:
        """The same attention with queries in the space of cache rows: a row is a key, its first L numbers a value."""
        return AttentionSpec(self.num_heads, 1, self.entry_width, self.kv_lora_rank, self.scaling)

    @property
    def key_weight(self) -> torch.Tensor:
        """[H, D - R, L], a view."""
        return self.weight.view(self.num_heads, -1, self.kv_lora_rank)[:, : -self.v_head_dim]

    @property
    def value_weight(self) -> torch.Tensor:
        """[H, Dv, L], a view."""
        return self.weight.view(self.num_heads, -1, self.kv_lora_rank)[:, -self.v_head_dim :]
