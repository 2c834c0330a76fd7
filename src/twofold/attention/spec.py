"""What one layer's attention computes in every step, and what is in its KV entries.

A *KV entry* is all that a layer keeps of a token. Only a spec knows its columns:

    AttentionSpec   | head 0: key D, value Dv | head 1: key D, value Dv | ... |   some heads are one range of columns
    LatentSpec      | latent: L | RoPE part of the keys: R |
"""

from dataclasses import dataclass, field, replace

import torch


@dataclass(frozen=True, slots=True, eq=False)
class AttentionSpec:
    """Read off the layer's own call of the attention interface (`models/probe.py`), so no family needs code."""

    num_heads: int  # H
    num_kv_heads: int  # Hk
    qk_head_dim: int  # D
    v_head_dim: int  # Dv
    scaling: float  # multiplies q·k
    sliding_window: int | None = None  # keys that a query attends to, itself among them
    softcap: float | None = None  # logits become softcap * tanh(logits / softcap)
    sinks: torch.Tensor | None = None  # [H] logits that take part in the softmax's sum and have no value
    values_in_keys: bool = False  # an entry holds keys only; the first Dv numbers of a head's key are its value

    @property
    def attends_to_all(self) -> bool:
        """Whether a query attends to all tokens before it, so that any part of them may be attended to by itself."""
        return self.sliding_window is None

    @property
    def entry_width(self) -> int:
        """Numbers in a KV entry."""
        return self.num_kv_heads * (self.qk_head_dim + (0 if self.values_in_keys else self.v_head_dim))

    @staticmethod
    def pack(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """KV entries [N, entry_width] of what a module hands to attention: key [N, Hk, D], value [N, Hk, Dv].

        It is the same for all specs, so a compiled layer can pack without knowing its own spec.
        """
        return torch.cat([key, value], dim=-1).flatten(1)

    def unpack(self, entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of entries [..., entry_width] as keys [..., Hk, D] and values [..., Hk, Dv]."""
        heads = entries.unflatten(-1, (self.num_kv_heads, -1))
        if self.values_in_keys:
            return heads, heads[..., : self.v_head_dim]
        keys, values = heads.split([self.qk_head_dim, self.v_head_dim], dim=-1)
        return keys, values


def split_heads(spec: AttentionSpec, num_parts: int) -> list[AttentionSpec]:
    """Attention of consecutive heads, over as many ranges of an entry's columns; the key-value heads divide."""
    num_heads, num_kv_heads = spec.num_heads // num_parts, spec.num_kv_heads // num_parts
    sinks = [None] * num_parts if spec.sinks is None else spec.sinks.split(num_heads)
    return [replace(spec, num_heads=num_heads, num_kv_heads=num_kv_heads, sinks=some) for some in sinks]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LatentSpec(AttentionSpec):
    """Multi-head latent attention (`attention/mla.py`): keys and values of all heads are linear in a token's latent.

    The inherited fields describe attention over the expanded heads: H heads for keys and values, too. An entry holds
    only what they are expanded from. Backends are given `expanded` or `absorbed`, never the spec itself.
    """

    kv_lora_rank: int  # L
    qk_rope_head_dim: int  # R: the last R numbers of a key, its RoPE part, are the same for every head
    weight: torch.Tensor  # [H * (D - R + Dv), L] latent -> for each head its key's other part, then its value
    expanded: AttentionSpec = field(init=False)  # over entries of the heads' keys and values
    absorbed: AttentionSpec = field(init=False)  # over entries as they are kept, with queries moved into their space

    def __post_init__(self) -> None:
        heads, dim, v_dim, scaling = self.num_heads, self.qk_head_dim, self.v_head_dim, self.scaling
        absorbed = AttentionSpec(heads, 1, self.entry_width, self.kv_lora_rank, scaling, values_in_keys=True)
        object.__setattr__(self, "expanded", AttentionSpec(heads, heads, dim, v_dim, scaling))
        object.__setattr__(self, "absorbed", absorbed)

    @property
    def entry_width(self) -> int:
        """Numbers in a KV entry."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def unpack(self, entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of entries [..., entry_width] as latents [..., 1, L] and RoPE parts [..., 1, R]."""
        latents, k_rope = entries.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        return latents.unsqueeze(-2), k_rope.unsqueeze(-2)

    @property
    def key_weight(self) -> torch.Tensor:
        """[H, D - R, L], a view."""
        return self.weight.view(self.num_heads, -1, self.kv_lora_rank)[:, : -self.v_head_dim]

    @property
    def value_weight(self) -> torch.Tensor:
        """[H, Dv, L], a view."""
        return self.weight.view(self.num_heads, -1, self.kv_lora_rank)[:, -self.v_head_dim :]
