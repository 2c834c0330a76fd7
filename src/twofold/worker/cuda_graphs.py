"""Whole forward passes as CUDA graphs, for steps so short that launching them takes longer than running them.

A graph is recorded for a *shape*: N tokens on every rank, all of them decodes or in at most a few rows. The step is
padded to the nearest shape and its inputs are copied to where the graph reads them. The shape follows from the
scheduled batch alone, so all ranks replay the same graph, collectives included, however many tokens each of them has.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from twofold.attention.metadata import AttentionMetadata
from twofold.parallel.exchange import Exchange, ExchangePlan
from twofold.worker.input_batch import InputBatch

Forward = Callable[[torch.Tensor, torch.Tensor, AttentionMetadata, ExchangePlan, bool], torch.Tensor]

MAX_PREFILL_TOKENS = 2048  # of a rank; longer steps keep the GPU busy while the next kernels are launched
PREFILL_ROUNDING = 128
DECODE_ROUNDING = 8
PREFILL_ROWS = 8  # of a rank, the padding's among them
PREFILL_DECODE_LEN = 8192  # keys of a row of one token: among others, it has no kernel of its own in a graph


@dataclass(slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    input_ids: torch.Tensor  # [N]
    position_ids: torch.Tensor  # [N]
    slots: torch.Tensor  # [P * N]
    metadata: AttentionMetadata
    hidden_states: torch.Tensor  # [N, hidden_size]; of rows' last tokens [PREFILL_ROWS, hidden_size] in a prefill
    exchange_bytes: int = 0  # received in a replay


class CUDAGraphs:
    """Records graphs of `forward`, and replays the one that fits."""

    def __init__(
        self, forward: Forward, num_ranks: int, max_num_seqs: int, max_num_blocks: int, block_size: int,
        max_copied_tokens: int | None, exchange: Exchange, device: torch.device,
    ) -> None:  # fmt: skip
        """`max_copied_tokens`: attention makes a copy of all blocks of its rows, of so many tokens at most, for which a
        graph must set room aside. None if it makes none."""
        self._forward, self._exchange = forward, exchange
        self._num_ranks, self._device = num_ranks, device
        self._max_num_blocks, self._block_size = max_num_blocks, block_size
        self._copies_blocks = max_copied_tokens is not None
        most = -(-max_num_seqs // num_ranks) + DECODE_ROUNDING
        self.decode_sizes = [size for size in (1, 2, 4) if size < most] + list(
            range(DECODE_ROUNDING, most, DECODE_ROUNDING)
        )
        self.prefill_sizes = [
            size
            for size in range(PREFILL_ROUNDING, MAX_PREFILL_TOKENS + 1, PREFILL_ROUNDING)
            if max_copied_tokens is None or self._max_row_blocks(size) * block_size <= max_copied_tokens
        ]
        self._graphs: dict[tuple[int, bool], _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def pad(self, num_tokens: int, is_decode: bool) -> int:
        """Rounds up the most tokens that any rank has to what a graph is recorded for."""
        sizes = self.decode_sizes if is_decode else self.prefill_sizes
        return next((size for size in sizes if size >= num_tokens), num_tokens)

    def _max_row_blocks(self, num_tokens: int) -> int:
        """Of prompts that begin in the step: a rank's head and tail see (2P + 1) / 2P of their prompt together."""
        size = self._num_ranks
        keys = num_tokens if size == 1 else num_tokens * (2 * size + 1) // 2
        return -(-keys // self._block_size) + PREFILL_ROWS

    def record(self, num_tokens: int, is_decode: bool) -> None:
        """Records the graph of one shape; all ranks record the same ones in the same order."""
        device, n = self._device, num_tokens
        rows = n if is_decode else PREFILL_ROWS
        metadata = AttentionMetadata(
            num_tokens=n,
            query_start_np=torch.empty(0).numpy(),
            seq_lens_np=torch.empty(0).numpy(),
            block_tables_np=torch.empty(0).numpy(),
            query_start=torch.zeros(rows + 1, dtype=torch.int32, device=device),
            seq_lens=torch.zeros(rows, dtype=torch.int32, device=device),
            block_tables=torch.zeros(rows, self._max_num_blocks, dtype=torch.int32, device=device),
            max_query_len=1 if is_decode else n,
            max_seq_len=self._max_num_blocks * self._block_size,
            num_row_blocks=0 if is_decode else self._max_row_blocks(n),
            num_decode_rows=rows if is_decode else 0,
        )
        if is_decode:
            metadata.query_start.copy_(torch.arange(rows + 1))
        else:
            metadata.query_start[1:] = n
            metadata.seq_lens[0] = n
        graph = _Graph(
            graph=torch.cuda.CUDAGraph(),
            input_ids=torch.zeros(n, dtype=torch.long, device=device),
            position_ids=torch.zeros(n, dtype=torch.long, device=device),
            slots=torch.zeros(self._num_ranks * n, dtype=torch.long, device=device),
            metadata=metadata,
            hidden_states=torch.empty(0),
        )
        plan = ExchangePlan(graph.slots, defer_exchange=is_decode)
        for _ in range(2):  # kernels are compiled and chosen outside of the recording
            self._forward(graph.input_ids, graph.position_ids, metadata, plan, is_decode)
        torch.cuda.synchronize()
        before = self._exchange.num_bytes
        # Other threads (NCCL's watchdog) go on using CUDA meanwhile.
        with torch.cuda.graph(graph.graph, pool=self._pool, capture_error_mode="thread_local"):
            graph.hidden_states = self._forward(graph.input_ids, graph.position_ids, metadata, plan, is_decode)
        graph.exchange_bytes = self._exchange.num_bytes - before
        self._graphs[n, is_decode] = graph

    def replay(self, batch: InputBatch) -> torch.Tensor | None:
        """Hidden states of a step, or None where no graph fits it."""
        n, is_decode = len(batch.input_ids), batch.is_decode
        graph = self._graphs.get((n, is_decode))
        if graph is None:
            return None
        if not is_decode:
            if batch.needs_all_hidden_states:
                return None
            if batch.max_num_rows > PREFILL_ROWS or batch.max_decode_len > PREFILL_DECODE_LEN:
                return None
            if self._copies_blocks and batch.max_row_blocks > graph.metadata.num_row_blocks:
                return None
        graph.input_ids.copy_(batch.input_ids)
        graph.position_ids.copy_(batch.position_ids)
        graph.slots.copy_(batch.exchange.slots)
        static, given = graph.metadata, batch.metadata
        rows, columns = given.block_tables.shape
        static.block_tables[:rows, :columns].copy_(given.block_tables)
        static.seq_lens[:rows].copy_(given.seq_lens)
        if not is_decode:
            static.seq_lens[rows:] = 0
            static.query_start[: rows + 1].copy_(given.query_start)
            static.query_start[rows + 1 :] = n
        graph.graph.replay()
        self._exchange.num_bytes += graph.exchange_bytes
        return graph.hidden_states
