"""What a model is to a plan: bytes of its weights and KV entries, and what its layers multiply. No PyTorch.

`models/sizes.py` makes it of a configuration.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Divisible:
    """Weights of a layer that ranks can divide by heads: together, or not at all."""

    layer: int
    num_bytes: int
    counts: tuple[int, ...]  # heads and columns; each must be a multiple of the number of ranks

    def divides(self, num_ranks: int) -> bool:
        return all(count % num_ranks == 0 for count in self.counts)


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """One layer's attention, and what it keeps of a token."""

    num_heads: int
    num_kv_heads: int
    qk_head_dim: int
    v_head_dim: int
    entry_numbers: int  # in a KV entry
    window: int | None = None  # keys that a query attends to, itself among them
    latent: int = 0  # numbers of the latent that keys and values are expanded from; 0: entries are keys and values

    def has_divided_entries(self, num_ranks: int) -> bool:
        """Whether a rank's heads have entries of their own."""
        return not self.latent and self.num_heads % num_ranks == self.num_kv_heads % num_ranks == 0

    @property
    def pair_flops(self) -> int:
        """Of a query, a key and a value, over all heads."""
        return 2 * self.num_heads * (self.qk_head_dim + self.v_head_dim)

    @property
    def expand_flops(self) -> int:
        """Of a token's keys, but for their RoPE part, and values, made of its latent."""
        num_rope = self.entry_numbers - self.latent
        return 2 * self.latent * self.num_heads * (self.qk_head_dim - num_rope + self.v_head_dim)


@dataclass(frozen=True, slots=True)
class Experts:
    """Of all sparse layers together."""

    num_layers: int
    num_experts: int  # of a layer
    num_chosen: int  # by a token
    num_bytes: int

    def share_used(self, num_tokens: float) -> float:
        """Of the experts, by so many tokens that choose at random."""
        return float(1 - (1 - self.num_chosen / self.num_experts) ** num_tokens)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Of one copy of a model. Tied tensors count once."""

    layers: int  # bytes of all decoder layers
    largest_layer: int  # bytes
    rest: int  # bytes of embedding, head and what else is no layer's
    head: int  # bytes that are read for a token's logits
    itemsize: int  # bytes of a number
    hidden_size: int
    divisible: tuple[Divisible, ...]
    attention: tuple[LayerAttention, ...]  # layer -> its attention
    experts: Experts | None = None
    inner_numbers: int = 0  # that a token has between the two halves of all MLPs, chosen experts' among them

    @property
    def num_layers(self) -> int:
        return len(self.attention)

    @property
    def entry(self) -> int:
        """Bytes of one token's KV entries, all layers."""
        return sum(layer.entry_numbers for layer in self.attention) * self.itemsize

    @property
    def whole(self) -> int:
        return self.layers + self.rest

    def divided(self, num_ranks: int) -> int:
        """Bytes of the layers that divide over so many ranks."""
        return sum(group.num_bytes for group in self.divisible if group.divides(num_ranks))

    def kept(self, num_ranks: int) -> int:
        """Bytes of sharded weights that a rank keeps: its part of what divides, and the rest."""
        return self.whole - self.divided(num_ranks) + self.divided(num_ranks) // num_ranks

    def fetched(self, num_ranks: int) -> int:
        """Bytes of the two buffers for layers that come from other ranks."""
        of_layer = dict.fromkeys(range(self.num_layers), 0)
        for group in self.divisible:
            if group.divides(num_ranks):
                of_layer[group.layer] += group.num_bytes
        return 2 * max(of_layer.values(), default=0)

    def weights_on(self, num_ranks: int, sharded: bool) -> int:
        """Bytes of memory that each rank needs for weights."""
        return self.kept(num_ranks) + self.fetched(num_ranks) if sharded and num_ranks > 1 else self.whole

    def entry_on(self, num_ranks: int, sharded: bool) -> float:
        """Bytes of a token's KV entries on each rank, on average."""
        return self.entry / num_ranks if sharded else self.entry
