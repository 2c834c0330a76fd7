"""Run all layers like Llama's by one operation, in steps of few tokens: each thread waits for the others, not for us.

    ids ──embed──► hidden states ──layers──► normed hidden states
                                     │
                                     └──► new KV entries in this rank's cache, and attention over its blocks

It serves steps in which no layer needs another rank's new entries.
"""

from typing import TYPE_CHECKING, Any, cast

import torch

from twofold.attention.backends.native import NativeBackend
from twofold.attention.metadata import AttentionMetadata
from twofold.attention.op import ForwardContext
from twofold.attention.spec import AttentionSpec
from twofold.kv.cache import KVCache
from twofold.models.probe import example_ids, largest_change
from twofold.models.transforms.base import Transform
from twofold.models.transforms.last_layer import LastLayer
from twofold.models.transforms.native import Layers, Norms
from twofold.native.load import kernels
from twofold.parallel.exchange import Exchange, ExchangePlan
from twofold.parallel.mesh import SingleRank
from twofold.parallel.transport import OneRank

if TYPE_CHECKING:
    from twofold.models.decoder import DecoderModel

MAX_TOKENS = 32  # of a step: with more, products by all threads take longer than what is saved
BLOCK_SIZE = 16  # of the cache that results are compared with


class Stack(Transform):
    """What a model's layers need to run together."""

    name = "all layers by our kernel"

    def __init__(self, model: "DecoderModel") -> None:
        self.model = model

    def find(self) -> str | None:
        body, specs = self.model.body, self.model.specs
        children: dict[str, Any] = dict(body.named_children())
        if set(children) != {"embed_tokens", "layers", "norm", "rotary_emb"} or not kernels:
            return "the model has other parts than Llama's"
        layers: list[Any] = [layer.layer if isinstance(layer, LastLayer) else layer for layer in children["layers"]]
        norms = [norm for layer in layers for norm in _norms(layer)] + [children["norm"]]
        if len(layers) != len(specs) or not all(Layers.fits(cast(Layers, self), layer) for layer in layers):
            return "its layers are not like Llama's"
        if not Norms.fits(cast(Norms, self), children["norm"]) or len({norm.variance_epsilon for norm in norms}) != 1:
            return "its norms differ"
        if not all(type(spec) is AttentionSpec and spec.sinks is None for spec in specs):
            return "its attention is not by heads"
        if len({(spec.num_heads, spec.num_kv_heads, spec.scaling, spec.softcap) for spec in specs}) != 1:
            return "its layers attend in different ways"
        self._embed, self._rotary, self._norm = (children[name] for name in ("embed_tokens", "rotary_emb", "norm"))
        # [L, parts of a layer]: kept, as the operation gets their addresses.
        self._weights = [_weights(layer) for layer in layers]
        if not all(part is None or part.is_contiguous() for weights in self._weights for part in weights):
            return "a weight is a part of another"
        self._inner = layers[0].mlp.down_proj.in_features
        self._cache: KVCache | None = None
        self._expected = self._results()
        return None

    def apply(self) -> None:
        self.model.stack = self

    def verify(self) -> float:
        return largest_change(self._results(), self._expected)

    def undo(self) -> None:
        self.model.stack = None

    def serves(self, num_tokens: int, context: ForwardContext) -> bool:
        """Whether `run` computes this step."""
        return (
            num_tokens <= MAX_TOKENS
            and context.fetch is None
            and context.own is None
            and context.on_publish is None
            and context.metadata.shared_prefix is None
            and isinstance(context.backend, NativeBackend)
            and isinstance(context.cache, KVCache)
            and context.cache.blocks[0].is_contiguous()
            and context.exchange.own_slots() is not None
        )

    def run(self, input_ids: torch.Tensor, position_ids: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """input_ids [N], position_ids [N] → hidden states [N, hidden_size] after the last norm."""
        cache, metadata, spec = context.cache, context.metadata, self.model.specs[0]
        assert isinstance(cache, KVCache)
        if cache is not self._cache:
            self._cache, self._layers = cache, self._addresses(cache)
        hidden = self._embed(input_ids)
        cos, sin = (x[0].contiguous() for x in self._rotary(hidden[None], position_ids[None]))
        out: torch.Tensor = torch.ops.twofold_cpu.layers(
            hidden, self._layers, self._norm.weight, self._norm.variance_epsilon, cos, sin,
            context.exchange.own_slots(), metadata.query_start, metadata.seq_lens, metadata.block_tables,
            len(metadata.seq_lens_np), cache.block_size,
            spec.num_heads, spec.num_kv_heads, self._inner, spec.scaling, spec.softcap or 0.0,
        )  # fmt: skip
        return out

    def _addresses(self, cache: KVCache) -> torch.Tensor:
        """int64 [L, 14], as `Layer` in kernels.cpp has them."""
        rows = [
            [0 if part is None else part.data_ptr() for part in weights] + [slots.data_ptr(), spec.sliding_window or 0]
            for weights, slots, spec in zip(self._weights, cache.slots, self.model.specs, strict=True)
        ]
        return torch.tensor(rows, dtype=torch.int64)

    @torch.inference_mode()
    def _results(self) -> list[torch.Tensor]:
        """Hidden states and KV entries of a prompt of 5 tokens, then of a decode beside a prompt of 3."""
        model = self.model
        widths = [spec.entry_width for spec in model.specs]
        cache = KVCache(widths, 4, BLOCK_SIZE, model.dtype, torch.device("cpu"))
        ids = example_ids(model.body, 9)
        results = []
        for rows, tokens in (([(0, 5)], ids[:5]), ([(5, 1), (0, 3)], ids[5:])):
            metadata, positions, slots = rows_in_blocks(rows)
            exchange = Exchange(SingleRank(), OneRank())
            exchange.begin(ExchangePlan(slots, defer_exchange=False, by_heads=False))
            context = ForwardContext(model.specs, cache, exchange, NativeBackend(), metadata)
            results.append(model.hidden_states(tokens, positions, context, needs_all=True))
        return results + cache.slots


def _norms(layer: Any) -> tuple[Any, Any]:
    return getattr(layer, "input_layernorm", None), getattr(layer, "post_attention_layernorm", None)


def _weights(layer: Any) -> list[torch.Tensor | None]:
    attention, mlp = layer.self_attn, layer.mlp
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    before, after = _norms(layer)
    return [
        before.weight,
        *(projection.weight for projection in projections),
        *(projection.bias for projection in projections),
        attention.o_proj.weight,
        after.weight,
        mlp.gate_proj.weight,
        mlp.up_proj.weight,
        mlp.down_proj.weight,
    ]


def rows_in_blocks(rows: list[tuple[int, int]]) -> tuple[AttentionMetadata, torch.Tensor, torch.Tensor]:
    """Rows of (start, length), each in a block of its own → metadata, positions [T] and slots [T]."""
    lengths, ends = [length for _, length in rows], [start + length for start, length in rows]
    positions = torch.cat([torch.arange(start, start + length) for start, length in rows])
    tables = torch.arange(1, len(rows) + 1, dtype=torch.int32)[:, None]
    slots = tables[:, 0].long().repeat_interleave(torch.tensor(lengths)) * BLOCK_SIZE + positions
    starts = torch.tensor([0, *lengths]).cumsum(0)
    lens = torch.tensor(ends)
    metadata = AttentionMetadata(
        num_tokens=sum(lengths), query_start_np=starts.numpy(), seq_lens_np=lens.numpy(),
        block_tables_np=tables.numpy(), query_start=starts.int(), seq_lens=lens.int(), block_tables=tables,
        max_query_len=max(lengths), max_seq_len=max(ends), num_row_blocks=len(rows), num_decode_rows=0,
    )  # fmt: skip
    return metadata, positions, slots
