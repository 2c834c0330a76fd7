"""What Transformers' modules call for attention: two opaque custom ops, the same for every model and layer.

    k, v of my tokens ──pack──► my KV entries ──publish──► everyone's entries in the kv_cache
    q of my tokens    ─────────────────────────────────────────────────────────attend──► attention of my rows

They are two so that entries can travel while this rank still computes its queries.

The model passes its projections and nothing else. The *forward context*, which the model runner sets around the forward
pass, has the rest: rows, their blocks, the cache, the exchange and the backend.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface

from twofold.attention import mla, own_blocks, shared_prefix
from twofold.attention.backends.base import AttentionBackend
from twofold.attention.combine import apply_sinks
from twofold.attention.metadata import AttentionMetadata
from twofold.attention.own_blocks import OwnBlocks
from twofold.attention.spec import AttentionSpec, LatentSpec, split_heads
from twofold.kv.cache import KVCache, Write
from twofold.kv.sharded import ShardedKVCache
from twofold.parallel.exchange import Exchange
from twofold.parallel.fetch_entries import EntryFetch, Placement

ATTENTION_NAME = "twofold"


@dataclass(slots=True)
class ForwardContext:
    """Everything that attention needs beyond q, k and v.

    Layers are told apart by the order in which they publish: a compiled layer then serves for all of them.
    """

    specs: Sequence[AttentionSpec]  # layer -> what its attention computes
    cache: KVCache | ShardedKVCache
    exchange: Exchange
    backend: AttentionBackend
    metadata: AttentionMetadata
    fetch: EntryFetch | None = None  # where ranks keep shares of the cache, and some layer needs whole entries
    own: OwnBlocks | None = None  # in a step of decodes, for layers that need a workspace in no such step
    layer: int = -1  # the layer that runs its attention now
    on_publish: Callable[[torch.Tensor], None] | None = None  # takes a layer's KV entries in place of `publish`
    copied: mla.CopiedRows | None = None  # shared by layers with latents
    # id of a placement -> the step's rows, and the same over its workspace: the same object for all layers.
    over_workspace: dict[int, tuple[AttentionMetadata, AttentionMetadata]] = field(default_factory=dict)

    def publish(self, entries: torch.Tensor) -> None:
        """Sends the next layer's KV entries [N, entry_width] on their way into every rank's kv_cache."""
        self.layer += 1
        fetch = self.fetch
        if fetch is not None and fetch.serves(self.layer):
            self.exchange.publish_shares(entries, fetch.writes(self.layer), fetch.ready(self.layer))
        elif self._stays_in_blocks():
            assert self.own is not None
            self.exchange.publish_shares(entries, [Write(self.own.slots, self.cache.slots[self.layer])], None)
        else:
            self.exchange.publish(entries, self.cache.slots[self.layer])

    def attend(self, query: torch.Tensor) -> torch.Tensor:
        """query [N, H, D] of the layer → [N, H, Dv]."""
        fetch, layer, spec = self.fetch, self.layer, self.specs[self.layer]
        if self._stays_in_blocks():
            return self._attend_own(query, spec)
        if fetch is None or not fetch.serves(layer):
            return self._attend(query, self.cache.blocks[layer], spec, self.metadata)
        caches, rows = fetch.caches(layer), self._rows_over_workspace(fetch.placement(layer))
        if len(caches) == 1:
            out = self._attend(query, caches[0], spec, rows)
        else:
            specs, mine = split_heads(spec, len(caches)), fetch.cache.rank
            queries = query.split(specs[0].num_heads, dim=1)
            out = torch.cat(
                [
                    self._attend(part, kv_cache, one, self.metadata if rank == mine else rows)
                    for rank, (part, kv_cache, one) in enumerate(zip(queries, caches, specs, strict=True))
                ],
                dim=1,
            )
        fetch.finish(layer)
        return out

    def _stays_in_blocks(self) -> bool:
        """Whether the layer's queries travel, and no entry of earlier steps does."""
        if self.own is None or self.fetch is None or self.fetch.serves(self.layer):
            return False
        return not self.fetch.cache.shares[self.layer].by_heads

    def _attend_own(self, query: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
        assert self.own is not None
        assert self.fetch is not None
        num_heads, mesh = self.fetch.cache.shares[self.layer].num_heads, self.exchange.mesh
        kv_cache = self.cache.blocks[self.layer]
        if isinstance(spec, LatentSpec):
            return mla.attend_own(query, kv_cache, spec, self.own, num_heads, self.backend, mesh)
        out, lse = own_blocks.attend(query, kv_cache, spec, self.own, num_heads, self.backend, mesh)
        return out if spec.sinks is None else apply_sinks(out, lse, spec.sinks)

    def _attend(
        self, query: torch.Tensor, kv_cache: torch.Tensor, spec: AttentionSpec, metadata: AttentionMetadata
    ) -> torch.Tensor:
        if isinstance(spec, LatentSpec):
            out, self.copied = mla.attend(query, kv_cache, spec, metadata, self.backend, self.copied)
            return out
        out, lse = shared_prefix.attend(query, kv_cache, spec, metadata, self.backend)
        return out if spec.sinks is None else apply_sinks(out, lse, spec.sinks)

    def _rows_over_workspace(self, placement: Placement) -> AttentionMetadata:
        before, rows = self.over_workspace.get(id(placement), (None, None))
        if before is not self.metadata or rows is None:
            rows = self.metadata.over(placement.block_tables_np, placement.block_tables)
            self.over_workspace[id(placement)] = self.metadata, rows
        return rows

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
    """Sends my KV entries [N, entry_width] on their way. The returned tensor is empty."""
    context: ForwardContext = _current.context
    (context.on_publish or context.publish)(entries)
    return entries.new_empty(0)


def _attend(query: torch.Tensor, entries: torch.Tensor, published: torch.Tensor, v_head_dim: int) -> torch.Tensor:
    """query [N, H, D] → [N, H, Dv], once everyone's entries have arrived.

    `entries` and `published` are arguments only to make a compiler keep the order, and the memory that is being sent.
    """
    context: ForwardContext = _current.context
    context.exchange.complete()
    return context.attend(query)


_library = torch.library.Library("twofold", "DEF")
_library.define("publish(Tensor entries) -> Tensor")
_library.define("attend(Tensor query, Tensor entries, Tensor published, int v_head_dim) -> Tensor")
_library.impl("publish", _publish, "CompositeExplicitAutograd")
_library.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("twofold::publish", lambda entries: entries.new_empty(0), lib=_library)
torch.library.register_fake(
    "twofold::attend",
    lambda query, entries, published, v_head_dim: query.new_empty(*query.shape[:2], v_head_dim),
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

    Where latents are kept, a key is the latent [1, 1, N, L] and a value the RoPE part [1, 1, N, R].
    """
    entries = AttentionSpec.pack(key[0].transpose(0, 1), value[0].transpose(0, 1))
    published = torch.ops.twofold.publish(entries)
    out = torch.ops.twofold.attend(query[0].transpose(0, 1), entries, published, module.twofold_v_head_dim)
    return out.unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, attention_forward)
