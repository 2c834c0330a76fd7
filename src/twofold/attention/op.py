"""What Transformers' modules call for attention: two opaque custom ops, the same for every model and layer.

    k, v of my tokens ──pack──► my cache rows ──publish──► everyone's rows in the pages
    q of my tokens    ────────────────────────────────────────────────────attend──► attention of my rows

They are two so that rows can travel while this rank still computes its queries.

The model passes its projections and nothing else. Which rows they are, where their blocks lie and who else computes is
in the *forward context* that the model runner sets around the forward pass.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from twofold.attention import mla
from twofold.attention.metadata import AttentionMetadata
from twofold.attention.mla import LatentKernels
from twofold.attention.spec import AttentionSpec, LatentSpec
from twofold.kv.cache import KVCache
from twofold.parallel.exchange import Exchange

ATTENTION_NAME = "twofold"


class AttentionBackend(LatentKernels, Protocol):
    """A kernel family: attention of a step's rows over kv_cache."""

    def can_capture(self, spec: AttentionSpec, dtype: torch.dtype, is_decode: bool) -> bool:
        """Whether such rows are read on the device only, so that a CUDA graph of it serves other steps too."""

    def attend(
        self, query: torch.Tensor, kv_cache: torch.Tensor, spec: AttentionSpec, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """query [N, H, D], kv_cache [num_blocks, block_size, entry_width] → [N, H, Dv]."""


@dataclass(slots=True)
class ForwardContext:
    """Everything that attention needs beyond q, k and v.

    Layers are told apart by the order in which they publish: a compiled layer then serves for all of them.
    """

    specs: Sequence[AttentionSpec]  # layer -> what its attention computes
    cache: KVCache
    exchange: Exchange
    backend: AttentionBackend
    metadata: AttentionMetadata
    layer: int = -1  # whose attention runs now
    on_publish: Callable[[torch.Tensor], None] | None = None  # takes a layer's KV entries in place of `publish`

    def publish(self, entries: torch.Tensor) -> None:
        """Sends the next layer's KV entries [N, entry_width] on their way into every rank's kv_cache."""
        self.layer += 1
        self.exchange.publish(entries, self.cache.slots[self.layer])

    def select_last_tokens(self) -> torch.Tensor:
        """Queries are those of each row's last token from now on; → [V'] row -> its last token."""
        last_token_idx = self.metadata.last_token_idx()
        self.metadata = self.metadata.of_last_tokens()
        return last_token_idx


_current = threading.local()


@contextmanager
def forward_context(context: ForwardContext) -> Iterator[None]:
    """Makes `context` the one that attention sees, in this thread."""
    _current.context = context
    try:
        yield
    finally:
        del _current.context


def _publish(entries: torch.Tensor) -> torch.Tensor:
    """Sends my KV entries [N, entry_width] on their way. Returns nothing worth reading."""
    context: ForwardContext = _current.context
    (context.on_publish or context.publish)(entries)
    return entries.new_empty(0)


def _attend(query: torch.Tensor, rows: torch.Tensor, published: torch.Tensor, v_head_dim: int) -> torch.Tensor:
    """query [N, H, D] → [N, H, Dv], once everyone's rows have arrived.

    It takes `rows` and `published` only so that a compiler keeps the order, and the memory that is being sent.
    """
    context: ForwardContext = _current.context
    spec = context.specs[context.layer]
    context.exchange.complete()
    kv_cache, metadata = context.cache.blocks[context.layer], context.metadata
    if isinstance(spec, LatentSpec):
        return mla.attend(query, kv_cache, spec, metadata, context.backend)
    return context.backend.attend(query, kv_cache, spec, metadata)


_library = torch.library.Library("twofold", "DEF")
_library.define("publish(Tensor rows) -> Tensor")
_library.define("attend(Tensor query, Tensor rows, Tensor published, int v_head_dim) -> Tensor")
_library.impl("publish", _publish, "CompositeExplicitAutograd")
_library.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("twofold::publish", lambda rows: rows.new_empty(0), lib=_library)
torch.library.register_fake(
    "twofold::attend",
    lambda query, rows, published, v_head_dim: query.new_empty(*query.shape[:2], v_head_dim),
    lib=_library,
)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The function that `AttentionInterface` knows as "twofold". query [1, H, N, D] → [1, N, H, Dv].

    Where latents are kept, a key is the latent [1, 1, N, L] and a value the rotated part [1, 1, N, R].
    """
    rows = torch.cat([key[0].transpose(0, 1).flatten(1), value[0].transpose(0, 1).flatten(1)], dim=-1)
    published = torch.ops.twofold.publish(rows)
    out = torch.ops.twofold.attend(query[0].transpose(0, 1), rows, published, module.twofold_v_head_dim)
    return out.unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, attention_forward)
