"""What Transformers' modules call for attention: one opaque custom op, the same for every model and layer.

    q, k, v of my tokens ──pack──► my cache rows ──exchange──► everyone's rows in the pages ──► attention of my rows

The model passes its projections and nothing else; which rows they are, where the pages lie and who else computes is in
the *forward context* that the model runner sets around the forward pass.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from twofold.attention.metadata import AttentionMetadata
from twofold.attention.spec import AttentionSpec
from twofold.parallel.exchange import Exchange
from twofold.worker.kv_cache import KVCache

ATTENTION_NAME = "twofold"


class AttentionBackend(Protocol):
    """A kernel family: attention of a step's rows over pages."""

    def attend(
        self, query: torch.Tensor, pages: torch.Tensor, spec: AttentionSpec, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """query [T, H, D], pages [num_blocks, block_size, row_width] → [T, H, Dv]."""


@dataclass(slots=True)
class ForwardContext:
    """Everything that attention needs beyond q, k and v."""

    specs: Sequence[AttentionSpec]  # layer -> what its attention computes
    cache: KVCache
    exchange: Exchange
    backend: AttentionBackend
    metadata: AttentionMetadata


_current = threading.local()


@contextmanager
def forward_context(context: ForwardContext) -> Iterator[None]:
    """Makes `context` the one that attention sees, in this thread."""
    _current.context = context
    try:
        yield
    finally:
        del _current.context


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int) -> torch.Tensor:
    """query [T', H, D], key [T', Hk, D], value [T', Hk, Dv] → [T', H, Dv]; tokens from T on are padding."""
    context: ForwardContext = _current.context
    spec, num_tokens = context.specs[layer], context.metadata.num_tokens
    rows = context.exchange.buffer(spec.row_width, like=key)  # [T, row_width]
    row_keys, row_values = spec.split_row(rows)
    row_keys.copy_(key[:num_tokens])
    row_values.copy_(value[:num_tokens])
    context.exchange.publish(rows, context.cache.slots[layer])
    out = query.new_zeros(*query.shape[:2], spec.v_head_dim)
    if num_tokens:
        out[:num_tokens] = context.backend.attend(
            query[:num_tokens], context.cache.pages[layer], spec, context.metadata
        )
    return out


def _attention_shape(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int) -> torch.Tensor:
    return query.new_empty(*query.shape[:2], value.shape[-1])


_library = torch.library.Library("twofold", "DEF")
_library.define("attention(Tensor query, Tensor key, Tensor value, int layer) -> Tensor")
_library.impl("attention", _attention, "CompositeExplicitAutograd")
torch.library.register_fake("twofold::attention", _attention_shape, lib=_library)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The function that `AttentionInterface` knows as "twofold". query [1, H, T, D] → [1, T, H, Dv]."""
    out = torch.ops.twofold.attention(
        query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), module.twofold_layer
    )
    return out.unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, attention_forward)
