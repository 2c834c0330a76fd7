"""How long steps take, by a model of time: products, attention, bytes that are read, bytes that travel. NumPy only.

    a layer by tokens   products of a rank's tokens, with whole weights; attention of its pairs; everyone's entries
    a layer by heads    1/P of the products of all tokens; 1/P of all pairs; two sums over ranks

The busiest rank counts. Products and the reading of their weights overlap; all else comes one after the other, but
fetched weights and KV entries, which come while the layer before computes.

Of several nodes, a step of prompts by tokens is cut over all ranks. Each node sends its tokens' KV entries once to
every other node, layer by layer; within a node they travel on. Weights and cache are shared within a node. A step by
heads runs on one node for each request.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from twofold.contract import ScheduledBatch
from twofold.parallel.plan import IntArray, StepPlan, TokenLayout, plan_step
from twofold.planning.processors import Link, Processor
from twofold.planning.shape import LayerAttention, ModelShape

SHORT_STEP = 0.03  # seconds of products at the peak
LONG_BYTES = 8e6  # of a layer's entries, from which on attention in a step of decodes is split
MAX_TOKENS_BY_HEADS = 2048  # longer prompts run by tokens: costs of more are not measured at the start


@dataclass(frozen=True, slots=True)
class Setup:
    """How an engine runs a model."""

    num_ranks: int  # of all nodes
    num_nodes: int = 1
    link: Link | None = None  # between nodes
    overlaps_link: bool = False  # whether attention to a node's own entries runs while others are under way
    shards_weights: bool = False
    shards_cache: bool = False
    step_layout: str = "auto"
    policy: str = "dual_chunk_swap"
    max_num_batched_tokens: int = 65536

    @property
    def ranks_per_node(self) -> int:
        return self.num_ranks // self.num_nodes


@dataclass(frozen=True, slots=True)
class Parts:
    """Seconds of a step on its busiest rank."""

    products: float  # or the reading of their weights
    attention: float
    rest: float  # norms, activations, copies
    traffic: float  # between ranks, as far as it is not hidden
    overhead: float

    @property
    def total(self) -> float:
        return self.products + self.attention + self.rest + self.traffic + self.overhead


class TimeModel:
    """Of one model on ranks of one kind of processor, all in one machine."""

    def __init__(self, shape: ModelShape, processor: Processor, setup: Setup) -> None:
        self.shape, self.processor, self.setup = shape, processor, setup
        self._is_sparse = shape.experts is not None or any(layer.latent for layer in shape.attention)
        self._last_layer = (shape.num_layers - 1) / shape.num_layers  # of a prompt it runs for one token only

    def ttft(self, num_tokens: int, num_computed: int = 0) -> float:
        """Seconds until a prompt has its first token, if nothing else runs; `num_computed` tokens are in the cache."""
        reach = self.processor.reach
        engine = (reach.prompt + num_tokens * reach.prompt_token) * 1e-6
        return engine + sum(
            self.prefill(start, end - start).total for start, end in self.steps(num_tokens, num_computed)
        )

    def steps(self, num_tokens: int, num_computed: int = 0) -> Sequence[tuple[int, int]]:
        """First and last token of each step of a prompt."""
        cuts = [*range(num_computed, num_tokens, self.setup.max_num_batched_tokens), num_tokens]
        return list(itertools.pairwise(cuts))

    def token(self, batch_size: int, context: int) -> float:
        """Seconds from one token to the next one of `batch_size` requests with so many tokens each."""
        return min(
            self._in_layouts(lambda by_heads: self.decode(batch_size, context, by_heads), True), key=_total
        ).total

    def prefill(self, computed: int, scheduled: int, by_heads: bool | None = None) -> Parts:
        """A step of one prompt, which had `computed` tokens before."""
        if by_heads is not None:
            return self._prefill_by_heads(computed, scheduled) if by_heads else self._by_tokens(computed, scheduled)
        may_choose = scheduled <= MAX_TOKENS_BY_HEADS
        return min(self._in_layouts(lambda heads: self.prefill(computed, scheduled, heads), may_choose), key=_total)

    def _in_layouts(self, time: Callable[[bool], Parts], may_choose: bool) -> list[Parts]:
        layout = self.setup.step_layout
        num_ranks = self.setup.ranks_per_node
        can = num_ranks > 1 and self.shape.divided(num_ranks) > 0
        if layout == "heads" or not can or not may_choose:
            return [time(layout == "heads" and can)]
        return [time(False)] if layout == "tokens" else [time(False), time(True)]

    # --- Steps of prompts ---------------------------------------------------------------------------------------------

    def _by_tokens(self, computed: int, scheduled: int) -> Parts:
        setup = self.setup
        batch = ScheduledBatch.of([computed], [scheduled])
        plan = plan_step(batch, TokenLayout(setup.num_ranks, setup.policy))
        tokens = int(plan.num_tokens.max())
        products = self._products(tokens, 1) * self._last_layer
        attention = max(self._attention(plan, rank, 1) for rank in range(setup.num_ranks)) * self._last_layer
        expand = self._expand(computed + scheduled, 1)
        rest = self._rest(tokens, 1)
        overhead = self._overhead(is_decode=False)
        compute = products + attention + expand + rest + overhead
        traffic = self._exchange(tokens) + self._waits(compute, computed) + self._between_nodes(scheduled, attention)
        return Parts(products + expand + self._head(1), attention, rest, traffic, overhead)

    def _prefill_by_heads(self, computed: int, scheduled: int) -> Parts:
        num_ranks = self.setup.ranks_per_node
        plan = plan_step(ScheduledBatch.of([computed], [scheduled]), TokenLayout(1))
        products = self._products(scheduled, num_ranks) * self._last_layer
        attention = self._attention(plan, 0, num_ranks) * self._last_layer
        products += self._expand(computed + scheduled, num_ranks) + self._head(num_ranks)
        rest, overhead = self._rest(scheduled, num_ranks), self._overhead(is_decode=False)
        return Parts(products, attention, rest, self.sums(scheduled), overhead)

    def _products(self, num_tokens: float, num_parts: int) -> float:
        """Of all layers, of 1/`num_parts` of what divides, or the time to read their weights if that is longer.

        Products of few tokens of each expert overlap little with reading it.
        """
        shape, peak, reach = self.shape, self.processor.flops, self.processor.reach
        speed = self.processor.bandwidth * reach.memory
        of_experts = 0 if shape.experts is None else shape.experts.num_bytes
        divided = min(shape.divided(num_parts) if num_parts > 1 else 0, shape.layers)
        part = 1 - divided / shape.layers + divided / shape.layers / num_parts
        dense = (shape.layers - of_experts) * part
        flops = 2 * dense / shape.itemsize * num_tokens
        seconds = max(flops / (peak * self._share(flops)), dense / speed)
        if shape.experts is not None:
            mine, experts = of_experts * part, shape.experts
            flops = 2 * mine / shape.itemsize * num_tokens * experts.num_chosen / experts.num_experts
            reached = reach.divided_expert_products if num_parts > 1 else reach.expert_products
            seconds += flops / (peak * reached) + mine * experts.share_used(num_tokens) / speed
        return seconds

    def _share(self, flops: float) -> float:
        """What products reach of the peak in a step of so many."""
        reach, seconds = self.processor.reach, flops / self.processor.flops
        return reach.sustained + (reach.products - reach.sustained) / (1 + seconds / SHORT_STEP)

    def _attention(self, plan: StepPlan, rank: int, num_parts: int) -> float:
        rows = plan.rows_of(rank)
        start, length = plan.start[rows], plan.length[rows]
        seconds, ramp = 0.0, self.processor.reach.attention_ramp
        for layer, count in self._layers():
            pairs = num_pairs(start, length, layer.window)
            keys = pairs / max(1, int(length.sum()))
            share = self.processor.attention_share(layer.qk_head_dim + layer.v_head_dim) * keys / (keys + ramp)
            seconds += count * pairs * layer.pair_flops / (self.processor.flops * share) if pairs else 0.0
        return seconds / (num_parts if self._heads_divide else 1)

    def _layers(self) -> list[tuple[LayerAttention, int]]:
        kinds = dict.fromkeys(self.shape.attention, 0)
        for layer in self.shape.attention:
            kinds[layer] += 1
        return list(kinds.items())

    @property
    def _heads_divide(self) -> bool:
        layer, num_ranks = self.shape.attention[0], self.setup.ranks_per_node
        return layer.num_heads % num_ranks == layer.num_kv_heads % num_ranks == 0

    def _expand(self, num_keys: int, num_parts: int) -> float:
        """Keys and values of all tokens, made of their latents."""
        flops = num_keys * sum(layer.expand_flops for layer in self.shape.attention)
        return flops / num_parts / (self.processor.flops * self.processor.reach.products)

    def _rest(self, num_tokens: float, num_parts: int) -> float:
        """Reading and writing what a token has between products."""
        shape, experts = self.shape, self.shape.experts
        hidden = 10 * shape.num_layers * shape.hidden_size
        if experts is not None:  # tokens are sorted by expert, and put together again
            hidden += 4 * experts.num_layers * experts.num_chosen * shape.hidden_size
        numbers = hidden + 3 * shape.inner_numbers / num_parts
        return num_tokens * numbers * shape.itemsize / (self.processor.bandwidth * self.processor.reach.activations)

    def _head(self, num_parts: int) -> float:
        return self.shape.head / num_parts / (self.processor.bandwidth * self.processor.reach.memory)

    def _overhead(self, is_decode: bool) -> float:
        reach = self.processor.reach
        dense, sparse = (
            (reach.decode_layer, reach.decode_sparse_layer)
            if is_decode
            else (reach.prefill_layer, reach.prefill_sparse_layer)
        )
        return self.shape.num_layers * (sparse if self._is_sparse else dense) * 1e-6

    # --- Traffic ------------------------------------------------------------------------------------------------------

    def _exchange(self, num_tokens: int) -> float:
        """Every layer's new entries of the other ranks."""
        num_peers = self.setup.num_ranks - 1
        if not num_peers:
            return 0.0
        speed = self.processor.link * self.processor.reach.peer
        return self.shape.num_layers * self.processor.reach.exchange * 1e-6 + (
            num_peers * num_tokens * self.shape.entry / speed
        )

    def _waits(self, compute: float, num_computed: int) -> float:
        """For fetched weights and entries, which come while the layer before computes."""
        setup, shape, num_ranks = self.setup, self.shape, self.setup.ranks_per_node
        missing = 0.0
        if setup.shards_weights:
            missing += shape.divided(num_ranks) * (num_ranks - 1) / num_ranks
        if setup.shards_cache:
            missing += num_computed * shape.entry * (num_ranks - 1) / num_ranks
        fetch = missing / (self.processor.link * self.processor.reach.fetch)
        return max(0.0, fetch - compute) + fetch / shape.num_layers

    def _between_nodes(self, num_tokens: int, attention: float) -> float:
        """What every layer waits for entries of the other nodes; `attention` of all layers on the busiest rank."""
        link, num_nodes, num_layers = self.setup.link, self.setup.num_nodes, self.shape.num_layers
        if link is None or num_nodes == 1:
            return 0.0
        piece = num_tokens / num_nodes * self.shape.entry / num_layers  # of one node and layer
        if not self.setup.overlaps_link:
            return num_layers * link.seconds((num_nodes - 1) * piece)
        return num_layers * (pipelined(attention / num_layers, piece, num_nodes, link) - attention / num_layers)

    def sums(self, num_tokens: int) -> float:
        """Two in each layer, of every token's hidden state."""
        shape, num_ranks = self.shape, self.setup.ranks_per_node
        sent = 2 * (num_ranks - 1) / num_ranks * num_tokens * shape.hidden_size * shape.itemsize
        speed = self.processor.link * self.processor.reach.sums
        return 2 * shape.num_layers * (self.processor.reach.sum * 1e-6 + sent / speed)

    # --- Steps of answers ---------------------------------------------------------------------------------------------

    def decode(self, batch_size: int, context: int, by_heads: bool) -> Parts:
        """One token of each request, after `context` tokens each."""
        setup, processor = self.setup, self.processor
        num_parts = setup.ranks_per_node if by_heads else 1
        mine = -(-batch_size // (setup.num_nodes if by_heads else setup.num_ranks))
        products = self._products(mine, num_parts) + self._head(num_parts)
        attention = sum(count * self._read_entries(layer, mine, context, by_heads) for layer, count in self._layers())
        overhead = self._overhead(is_decode=True) + batch_size * processor.reach.request * 1e-6
        traffic = self.sums(mine) if by_heads else 0.0
        if not by_heads and setup.num_ranks > 1:
            waits = self._waits(products + attention + overhead, context * batch_size)
            traffic += waits + 2 * processor.reach.exchange * 1e-6  # entries of all layers travel together
        if setup.link is not None and setup.num_nodes > 1:
            traffic += setup.link.seconds((setup.num_nodes - 1) * batch_size / setup.num_nodes * self.shape.entry)
        return Parts(products, attention, 0.0, traffic, overhead)

    def _read_entries(self, layer: LayerAttention, num_requests: int, context: int, by_heads: bool) -> float:
        """One layer's attention of decodes: it reads all entries, or a rank's part of them."""
        divides = layer.has_divided_entries(self.setup.ranks_per_node) or self.setup.shards_cache
        numbers = num_requests * layer.entry_numbers * min(context, layer.window or context)
        read = numbers * self.shape.itemsize / (self.setup.ranks_per_node if by_heads and divides else 1)
        split = self.processor.reach.long_context * 1e-6 * read / (read + LONG_BYTES)
        return read / (self.processor.bandwidth * self.processor.reach.memory) + split


def num_pairs(start: IntArray, length: IntArray, window: int | None = None) -> int:
    """(query, key) pairs of rows: each token attends to itself and to those before, or to `window` keys at most."""
    whole = length * start + length * (length + 1) // 2
    if window is None:
        return int(whole.sum())
    growing = np.clip(window - start, 0, length)  # tokens of the row that attend to fewer keys, or just as many
    return int((growing * start + growing * (growing + 1) // 2 + (length - growing) * window).sum())


def pipelined(attention: float, piece: float, num_nodes: int, link: Link) -> float:
    """Seconds of a layer's attention that takes the nodes' entries in turn, its own first, as they arrive.

    own      | attend |
    piece 1  | travel ....| attend |
    piece 2              | travel ....| attend |
    """
    done = attention / num_nodes
    for number in range(1, num_nodes):
        done = max(done, link.seconds(number * piece)) + attention / num_nodes
    return done


def with_reach(processor: Processor, **changes: object) -> Processor:
    """The same processor with other shares or times."""
    return replace(processor, reach=replace(processor.reach, **changes))  # type: ignore[arg-type] # of Reach's types


def _total(parts: Parts) -> float:
    return parts.total
