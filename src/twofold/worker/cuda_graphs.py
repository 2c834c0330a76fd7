"""Whole forward passes as CUDA graphs, for steps so short that launching them takes longer than running them.

A graph is captured for a *shape*: N tokens on every rank, either all decodes or in a few rows. Small numbers of decodes
have a second graph, for rows that share a prefix. The step is padded to the nearest shape (`parallel/plan.py: Buckets`)
and its inputs are copied to where the graph reads them. The shape follows from the plan and all ranks' block tables, so
all ranks replay the same graph, collectives included, however many tokens each of them has.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from twofold.attention.metadata import AttentionMetadata, SharedPrefix
from twofold.attention.own_blocks import OwnBlocks
from twofold.attention.shared_prefix import padded_num_rows
from twofold.parallel.exchange import Exchange, ExchangePlan
from twofold.parallel.plan import Buckets, Layout
from twofold.worker.input_batch import InputBatch

Forward = Callable[[torch.Tensor, torch.Tensor, AttentionMetadata, ExchangePlan, bool, OwnBlocks | None], torch.Tensor]
Finish = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]

FEW_DECODES = (1, 2, 4, 8, 16, 24, 32)
DECODE_ROUNDING = 32  # of more: their weights take as long to read for some rows of padding
MAX_SHARED_PREFIX_ROWS = 32  # decodes in the largest graph that reads a shared prefix once
PREFILL_ROUNDING = ((2048, 128), (4096, 256), (8192, 512))  # up to the first number of tokens, multiples of the second
HEADS_PREFILL = (32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048)  # by heads; longer steps run by tokens
MAX_LOGIT_ROWS = 64  # rows of a graph that ends with logits; more take longer than launching their head does
PREFILL_ROWS = 8  # of a rank, including the row of padding
PREFILL_DECODE_LEN = 8192  # longest request with a one-token row that a prefill graph accepts: it is attended unsplit


@dataclass(frozen=True, slots=True)
class CaptureLimits:
    """Which shapes are worth capturing, and what each graph must have room for."""

    layout: Layout
    max_num_tokens: int  # of a rank in a prefill; longer steps keep the GPU busy while the next kernels are launched
    max_num_seqs: int
    max_num_blocks: int  # of a request
    block_size: int
    max_copied_tokens: int | None  # in blocks that attention copies for its rows; None if it copies none
    divides_blocks: bool = False  # of some layers ranks have different blocks: `OwnBlocks` are an input of the graphs

    def buckets(self) -> Buckets:
        most = self.layout.max_decodes(self.max_num_seqs)
        sizes = [*FEW_DECODES, *range(2 * DECODE_ROUNDING, most + DECODE_ROUNDING, DECODE_ROUNDING)]
        decode = sizes[: bisect_left(sizes, most) + 1]
        prefill: list[int] = []
        for end, rounding in PREFILL_ROUNDING:
            start = prefill[-1] if prefill else 0
            prefill += range(start + rounding, min(end, self.max_num_tokens) + 1, rounding)
        if self.layout.by_heads and self.max_num_tokens:
            prefill = list(HEADS_PREFILL)
        if self.max_copied_tokens is not None:
            limit = self.max_copied_tokens
            prefill = [size for size in prefill if self.max_row_blocks(size) * self.block_size <= limit]
        return Buckets(tuple(decode), tuple(prefill))

    def max_row_blocks(self, num_tokens: int) -> int:
        """Most blocks of a rank's rows if their prompts begin in the step. Each row counts its own blocks."""
        return -(-self.layout.max_keys(num_tokens) // self.block_size) + PREFILL_ROWS


@dataclass(slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    input_ids: torch.Tensor  # [N]
    position_ids: torch.Tensor  # [N]
    slots: torch.Tensor  # [P * N]
    metadata: AttentionMetadata
    outputs: "Outputs"
    own: OwnBlocks | None = None
    num_bytes: int = 0  # received in a replay from other ranks of the node
    num_node_bytes: int = 0  # and from other nodes


@dataclass(slots=True)
class Outputs:
    """What comes of a forward pass. Only a graph of few rows has more than hidden states."""

    hidden_states: torch.Tensor  # [N, hidden_size], or of each row's last token [V', hidden_size]
    logits: torch.Tensor | None = None  # [V', vocab_size or this rank's part of it] of each row's last token
    greedy_token_ids: torch.Tensor | None = None  # [P, V'] of all ranks' rows; by heads [N, V'] of all nodes'


class CUDAGraphs:
    """Captures graphs of `forward` and `finish`, and replays the one that fits."""

    def __init__(
        self,
        forward: Forward,
        finish: Finish,
        limits: CaptureLimits,
        exchange: Exchange,
        device: torch.device,
        pool: Any,
    ) -> None:
        """`pool`: of memory, that graphs share which never run at the same time."""
        self._forward, self._finish = forward, finish
        self._limits, self._exchange, self._device = limits, exchange, device
        self._logits: torch.Tensor | None = None  # of whichever graph was replayed last
        self.buckets = limits.buckets()
        # Numbers of decodes with a graph for rows that share a prefix, too.
        self.shared_prefix_sizes = [size for size in self.buckets.decode if 2 <= size <= MAX_SHARED_PREFIX_ROWS]
        self._graphs: dict[tuple[int, bool, bool], _Graph] = {}  # tokens, is_decode, shares_prefix
        self._block_tables: dict[bool, torch.Tensor] = {}  # is_decode -> the largest one; graphs use its first rows
        self._pool = pool

    def __len__(self) -> int:
        return len(self._graphs)

    def capture(self, num_tokens: int, is_decode: bool, shares_prefix: bool = False) -> None:
        """Captures the graph of one shape; all ranks capture the same ones in the same order, the largest
        of each kind first."""
        device, n, limits = self._device, num_tokens, self._limits
        rows = n if is_decode else PREFILL_ROWS
        if is_decode not in self._block_tables:
            table = torch.zeros(rows, limits.max_num_blocks, dtype=torch.int32, device=device)
            self._block_tables[is_decode] = table
        metadata = AttentionMetadata(
            num_tokens=n,
            query_start_np=torch.empty(0).numpy(),
            seq_lens_np=torch.empty(0).numpy(),
            block_tables_np=torch.empty(0).numpy(),
            query_start=torch.zeros(rows + 1, dtype=torch.int32, device=device),
            seq_lens=torch.zeros(rows, dtype=torch.int32, device=device),
            block_tables=self._block_tables[is_decode][:rows],
            max_query_len=1 if is_decode else n,
            max_seq_len=limits.max_num_blocks * limits.block_size,
            num_row_blocks=0 if is_decode else limits.max_row_blocks(n),
            num_decode_rows=rows if is_decode else 0,
        )
        if is_decode:
            metadata.query_start.copy_(torch.arange(rows + 1))
        else:
            metadata.query_start[1:] = n
            metadata.seq_lens[0] = n
        if shares_prefix:
            metadata.shared_prefix = self._make_shared_prefix(metadata)
        graph = _Graph(
            graph=torch.cuda.CUDAGraph(),
            input_ids=torch.zeros(n, dtype=torch.long, device=device),
            position_ids=torch.zeros(n, dtype=torch.long, device=device),
            slots=torch.zeros(limits.layout.num_ranks * n, dtype=torch.long, device=device),
            metadata=metadata,
            outputs=Outputs(torch.empty(0)),
        )
        if is_decode and limits.divides_blocks:
            graph.own = self._make_own_blocks(graph)
        by_heads = limits.layout.by_heads
        plan = ExchangePlan(graph.slots, defer_exchange=is_decode or by_heads, by_heads=by_heads)

        def run() -> Outputs:
            hidden_states = self._forward(graph.input_ids, graph.position_ids, metadata, plan, is_decode, graph.own)
            return self._add_tokens(hidden_states) if rows <= MAX_LOGIT_ROWS else Outputs(hidden_states)

        for _ in range(2):  # kernels are compiled and chosen outside of the capture
            run()
        torch.cuda.synchronize()
        traffic = self._exchange.transport
        before = traffic.num_bytes, traffic.num_node_bytes
        # Other threads (NCCL's watchdog) use CUDA at the same time.
        with torch.cuda.graph(graph.graph, pool=self._pool, capture_error_mode="thread_local"):
            graph.outputs = run()
        graph.num_bytes = traffic.num_bytes - before[0]
        graph.num_node_bytes = traffic.num_node_bytes - before[1]
        self._graphs[n, is_decode, shares_prefix] = graph

    def _add_tokens(self, hidden_states: torch.Tensor) -> Outputs:
        logits, greedy_token_ids = self._finish(hidden_states)
        if self._logits is None:  # one for all graphs: one each would take gigabytes
            self._logits = logits.new_empty(MAX_LOGIT_ROWS, logits.shape[1])
        return Outputs(hidden_states, self._logits[: len(logits)].copy_(logits), greedy_token_ids)

    def replay(self, batch: InputBatch, own: OwnBlocks | None = None) -> Outputs | None:
        """What comes of a step, or None where no graph fits it."""
        plan, n = batch.plan, len(batch.input_ids)
        shared = batch.metadata.shared_prefix
        graph = self._graphs.get((n, plan.is_decode, True)) if shared is not None else None
        graph = graph or self._graphs.get((n, plan.is_decode, False))
        if graph is None:
            return None
        if not plan.is_decode:
            if plan.needs_all_hidden_states:
                return None
            if plan.max_num_rows > PREFILL_ROWS or plan.max_decode_len > PREFILL_DECODE_LEN:
                return None
            copies_blocks = self._limits.max_copied_tokens is not None
            if copies_blocks and plan.max_row_blocks(self._limits.block_size) > graph.metadata.num_row_blocks:
                return None
        graph.input_ids.copy_(batch.input_ids)
        graph.position_ids.copy_(batch.position_ids)
        graph.slots.copy_(batch.exchange.slots)
        static, given = graph.metadata, batch.metadata
        rows, columns = given.block_tables.shape
        static.block_tables[:rows, :columns].copy_(given.block_tables)
        static.seq_lens[:rows].copy_(given.seq_lens)
        if not plan.is_decode:
            static.seq_lens[rows:] = 0
            static.query_start[: rows + 1].copy_(given.query_start)
            static.query_start[rows + 1 :] = n
        if static.shared_prefix is not None and shared is not None:
            _copy_shared_prefix(static.shared_prefix, shared)
        if graph.own is not None:
            assert own is not None, "blocks are divided in every step of decodes"
            there, here = graph.own.rows, own.rows
            there.seq_lens.copy_(here.seq_lens)
            there.block_tables[:, : here.block_tables.shape[1]].copy_(here.block_tables)
            graph.own.slots.copy_(own.slots)
        graph.graph.replay()
        self._exchange.transport.num_bytes += graph.num_bytes
        self._exchange.transport.num_node_bytes += graph.num_node_bytes
        return graph.outputs

    def _make_own_blocks(self, graph: _Graph) -> OwnBlocks:
        """Where a graph of decodes reads which of its rows' blocks are this rank's."""
        limits, device, metadata = self._limits, self._device, graph.metadata
        num_rows = len(graph.input_ids) * (1 if limits.layout.by_heads else limits.layout.num_ranks)
        rows = replace(
            metadata,
            num_tokens=num_rows,
            query_start=torch.arange(num_rows + 1, dtype=torch.int32, device=device),
            seq_lens=torch.zeros(num_rows, dtype=torch.int32, device=device),
            block_tables=torch.zeros(num_rows, limits.max_num_blocks, dtype=torch.int32, device=device),
            num_decode_rows=num_rows,
            shared_prefix=None,
        )
        return OwnBlocks(rows, limits.layout.by_heads, torch.zeros_like(graph.slots))

    def _make_shared_prefix(self, metadata: AttentionMetadata) -> SharedPrefix:
        """Where a graph of decodes reads the prefix that rows share, and the rows without it."""
        num_rows, device = len(metadata.seq_lens), self._device
        prefix = replace(
            metadata,
            num_tokens=1,
            query_start=metadata.query_start[:2],
            seq_lens=torch.zeros(1, dtype=torch.int32, device=device),
            block_tables=torch.zeros_like(metadata.block_tables[:1]),
            num_decode_rows=1,
        )
        suffixes = replace(
            metadata,
            seq_lens=torch.zeros_like(metadata.seq_lens),
            block_tables=torch.zeros_like(metadata.block_tables),
        )
        rows = torch.zeros(padded_num_rows(num_rows), dtype=torch.long, device=device)
        return SharedPrefix(rows, prefix, suffixes)


def _copy_shared_prefix(static: SharedPrefix, given: SharedPrefix) -> None:
    num_rows = len(given.rows)
    static.rows[:num_rows].copy_(given.rows)
    static.rows[num_rows:] = given.rows[0]
    for there, here in ((static.prefix, given.prefix), (static.suffixes, given.suffixes)):
        there.seq_lens.copy_(here.seq_lens)
        there.block_tables[:, : here.block_tables.shape[1]].copy_(here.block_tables)
