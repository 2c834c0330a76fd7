"""One rank's steps: plan, prepare, forward, sample. `launch` enqueues a step, `collect` waits for its tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from twofold.attention.backends.base import AttentionBackend
from twofold.attention.metadata import AttentionMetadata
from twofold.attention.mla import piece_tokens
from twofold.attention.op import ForwardContext
from twofold.attention.own_blocks import OwnBlocks
from twofold.attention.spec import AttentionSpec, LatentSpec
from twofold.contract import Masks, PromptTokenLogprobs, Step, StepResult
from twofold.kv.cache import KVCache
from twofold.kv.sharded import LayerShare, ShardedKVCache
from twofold.models.decoder import DecoderModel
from twofold.parallel.exchange import Exchange, ExchangePlan
from twofold.parallel.fetch_entries import EntryFetch
from twofold.parallel.mesh import Axes, gather
from twofold.parallel.plan import UNPADDED, HeadLayout, Layout, TokenLayout, plan_step
from twofold.sampling_params import SamplingParams
from twofold.worker.cuda_graphs import CaptureLimits, CUDAGraphs, Outputs
from twofold.worker.device import Device, Event
from twofold.worker.fetch_plan import plan_fetch, plan_own_blocks
from twofold.worker.input_batch import InputBatch, prepare
from twofold.worker.request_states import RequestStates, counts_tokens
from twofold.worker.sampler import (
    LogprobTensors,
    SamplingBatch,
    best_of_part,
    choose,
    compute_logprobs,
    needs_all_logits,
    sample,
)

MAX_PROMPT_LOGPROBS = 512  # positions with logits over the vocabulary in memory at once


@dataclass(slots=True)
class LaunchedStep:
    """A step that was enqueued, and its results on their way to the CPU. They are there once `done`."""

    step: Step
    batch: InputBatch
    all_token_ids: torch.Tensor  # [P * max S]
    logprobs: LogprobTensors | None  # of my sampled tokens
    prompt_logprobs: list[tuple[int, int, LogprobTensors]]  # number of the request, position of the first token
    exchange_bytes: int
    node_bytes: int
    exchange_seconds: float
    done: Event


@dataclass(slots=True)
class Way:
    """All that steps of one layout need, and steps of the other have another one of."""

    layout: Layout
    model: DecoderModel
    # Set before the first step. Of a replicated cache steps by heads see this rank's part of the entries.
    cache: KVCache | ShardedKVCache | None = None
    fetched_layers: list[int] = field(default_factory=list)  # those that need whole entries, of a sharded cache
    decode_fetched_layers: list[int] = field(default_factory=list)  # those of them that do in steps of decodes, too
    graphs: CUDAGraphs | None = None


class ModelRunner:
    """Runs steps on one rank. Every rank runs the same steps in the same order."""

    def __init__(
        self,
        model: DecoderModel,
        states: RequestStates,
        axes: Axes,
        exchange: Exchange,
        backend: AttentionBackend,
        device: Device,
        layout: TokenLayout,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.states, self.eos_token_ids = states, eos_token_ids
        self.axes, self.exchange, self.backend, self.device = axes, exchange, backend, device
        self.by_tokens = Way(layout, model)
        self.by_heads: Way | None = None  # where steps may run so
        self.cache: KVCache | ShardedKVCache
        self.fetch: EntryFetch | None = None  # where each rank has a share of the cache

    @property
    def ways(self) -> list[Way]:
        return [way for way in (self.by_tokens, self.by_heads) if way is not None]

    @property
    def models(self) -> list[DecoderModel]:
        """Those of all ways, each once."""
        return list({id(way.model): way.model for way in self.ways}.values())

    def add_heads(self, model: DecoderModel) -> None:
        """Steps may run by heads from now on, with the rank's part `model`."""
        self.by_heads = Way(HeadLayout(self.axes.world.size, self.axes.node.size), model)

    def set_cache(self, cache: KVCache) -> None:
        """Steps use this cache from now on, of which every rank has the same."""
        self.cache = cache
        for way in self.ways:
            widths = [spec.entry_width for spec in way.model.specs]
            way.cache = cache.part(self.axes.gpu.rank, widths) if way.layout.by_heads else cache

    def set_shares(self, cache: ShardedKVCache, fetch: EntryFetch) -> None:
        """Steps use this cache from now on, of which each rank has a share."""
        self.cache, self.fetch = cache, fetch
        for way in self.ways:
            way.cache, way.fetched_layers = cache, fetched_layers(cache.shares, way.model.specs)
            way.decode_fetched_layers = fetched_layers(cache.shares, way.model.specs, in_decodes=True)

    @torch.inference_mode()
    def launch(self, step: Step, receive_masks: Callable[[], Masks] | None = None) -> LaunchedStep:
        """Enqueues one step. `receive_masks` is called once its forward pass is enqueued, if it has masked requests."""
        traffic = self.exchange.transport
        bytes_before, node_bytes_before = self._bytes_received(), traffic.num_node_bytes
        seconds_before = traffic.num_seconds
        self.states.apply(step)
        way = self.by_heads if step.by_heads else self.by_tokens
        assert way is not None, "steps by heads need a model that divides"
        plan = plan_step(step.batch, way.layout, UNPADDED if way.graphs is None else way.graphs.buckets)
        batch = prepare(step.batch, plan, self.states, self.axes.world.rank, self.cache.block_size)
        own = self._begin_fetch(way, step, batch)
        outputs = self._forward(way, batch, own)
        masks = None
        if step.masked:
            assert receive_masks is not None
            masks = self._to_device(receive_masks().words)
        all_token_ids, logprobs = self._sample(way, step, batch, outputs, masks)
        self.states.last_sampled[batch.all_sampled_state_idx] = all_token_ids
        prompt_logprobs = self._prompt_logprobs(way, step, batch, outputs.hidden_states)
        # All results are copied now: a copy that is enqueued after the next step would wait for that step.
        return LaunchedStep(
            step,
            batch,
            all_token_ids.to("cpu", non_blocking=True),
            None if logprobs is None else logprobs.to_cpu(),
            [(number, position, tensors.to_cpu()) for number, position, tensors in prompt_logprobs],
            self._bytes_received() - bytes_before,
            traffic.num_node_bytes - node_bytes_before,
            traffic.num_seconds - seconds_before,
            self.device.record(),
        )

    def _begin_fetch(self, way: Way, step: Step, batch: InputBatch) -> OwnBlocks | None:
        """Starts to fetch; → what layers use that fetch nothing, though ranks have different blocks."""
        if self.fetch is None:
            return None
        plan, own, cache, rank = None, None, self.fetch.cache, self.axes.gpu.rank
        layers = way.decode_fetched_layers if batch.plan.is_decode else way.fetched_layers
        if layers:
            shares = [cache.shares[layer] for layer in layers]
            plan = plan_fetch(step.batch, batch, rank, cache.block_size, cache.num_blocks, shares)
        if len(layers) < len(way.fetched_layers):
            own = plan_own_blocks(step.batch, batch, self.states, rank, cache.block_size)
        self.fetch.begin(plan, layers)
        return own

    def _bytes_received(self) -> int:
        traffic = self.exchange.transport
        return traffic.num_bytes + traffic.num_node_bytes + (0 if self.fetch is None else self.fetch.num_bytes)

    def collect(self, launched: LaunchedStep) -> StepResult:
        """Waits for a launched step; notes its tokens and returns those that this rank sampled."""
        scheduled, batch, rank = launched.step.batch, launched.batch, self.axes.world.rank
        launched.done.synchronize()
        token_ids: NDArray[np.int64] = launched.all_token_ids.numpy()
        sampled = batch.all_sampled_request_idx
        requests = sampled[sampled >= 0]
        self.states.append_sampled(scheduled.state_idx[requests], scheduled.numbers[requests], token_ids[sampled >= 0])
        start = rank * (len(sampled) // self.axes.world.size)
        mine = batch.sampled_request_idx
        return StepResult(
            step_id=launched.step.step_id,
            rank=rank,
            numbers=scheduled.numbers[mine],
            token_ids=token_ids[start : start + len(mine)].astype(np.int32),
            logprobs=None if launched.logprobs is None else launched.logprobs.to_numpy(),
            prompt_logprobs=tuple(
                PromptTokenLogprobs(number, position, tensors.to_numpy())
                for number, position, tensors in launched.prompt_logprobs
            ),
            num_pairs=int(batch.plan.num_pairs[rank]),
            exchange_bytes=launched.exchange_bytes,
            node_bytes=launched.node_bytes,
            exchange_seconds=launched.exchange_seconds,
        )

    def needs_tokens_on_cpu(self, step: Step) -> bool:
        """Whether the step samples with penalties, which count tokens on the CPU: earlier steps must be collected."""
        return bool(self.states.counts_tokens.any()) or any(counts_tokens(new.sampling_params) for new in step.new)

    def capture_graphs(self, num_tokens: int, only_largest: bool = False) -> None:
        """Captures CUDA graphs of steps with up to `num_tokens` tokens a rank. The cache must stay where it is.

        With `only_largest` one for each kind of step: for measuring what memory they take.
        """
        pool = torch.cuda.graph_pool_handle()
        for way in self.ways:
            way.graphs = None
            if way.decode_fetched_layers:  # what is fetched differs from step to step
                continue
            divides_blocks = bool(way.fetched_layers)  # nothing is fetched for decodes
            specs, dtype = way.model.specs, self.cache.blocks[0].dtype
            kinds = [
                is_decode
                for is_decode in ((True,) if divides_blocks else (False, True))
                if all(self.backend.can_capture(spec, dtype, is_decode) for spec in specs)
            ]
            copied = [piece_tokens(spec, dtype.itemsize) for spec in specs if isinstance(spec, LatentSpec)]
            limits = CaptureLimits(
                layout=way.layout,
                max_num_tokens=0 if divides_blocks else num_tokens,
                max_num_seqs=self.states.max_num_seqs,
                max_num_blocks=self.states.block_tables.shape[1],
                block_size=self.cache.block_size,
                max_copied_tokens=min(copied) if copied else None,
                divides_blocks=divides_blocks,
            )
            forward = partial(self._forward_eager, way)
            finish = partial(self._finish, way)
            graphs = CUDAGraphs(forward, finish, limits, self.exchange, self.device.torch_device, pool)
            with torch.inference_mode():
                for is_decode in kinds:
                    # The largest first: the smaller ones fit into its memory.
                    sizes = sorted(graphs.buckets.decode if is_decode else graphs.buckets.prefill, reverse=True)
                    for size in sizes[:1] if only_largest else sizes:
                        graphs.capture(size, is_decode)
                if True in kinds and not divides_blocks and any(spec.attends_to_all for spec in specs):
                    sizes = sorted(graphs.shared_prefix_sizes, reverse=True)
                    for size in sizes[:1] if only_largest else sizes:
                        graphs.capture(size, True, shares_prefix=True)
            way.graphs = graphs

    def _forward(self, way: Way, batch: InputBatch, own: OwnBlocks | None) -> Outputs:
        """Hidden states are those of all tokens, or of each row's last one if the plan needs no others.

        A rank without tokens runs padding and joins the exchange.
        """
        if way.graphs is not None and (outputs := way.graphs.replay(batch, own)) is not None:
            return outputs
        hidden_states = self._forward_eager(
            way, batch.input_ids, batch.position_ids, batch.metadata, batch.exchange,
            batch.plan.needs_all_hidden_states, own,
        )  # fmt: skip
        return Outputs(hidden_states)

    def _finish(self, way: Way, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits of rows [V', hidden_size], and the greedy tokens of all ranks' rows, as `Outputs` has them."""
        logits = way.model.logits(hidden_states)
        if not way.layout.by_heads:
            return logits, gather(self.axes.world, logits.argmax(dim=-1))
        if way.model.words is None:
            return logits, None
        num_rows = len(hidden_states)
        nothing = [np.empty(0, np.int32)] * num_rows
        greedy = SamplingBatch.build(
            [SamplingParams(temperature=0)] * num_rows,
            [0] * num_rows,
            [0] * num_rows,
            nothing,
            nothing,
            [()] * num_rows,
        )
        candidates = best_of_part(logits, way.model.words.start, greedy)
        token_ids = choose(gather(self.axes.gpu, candidates), greedy)
        return logits, self._of_nodes(token_ids).view(-1, num_rows)

    def _forward_eager(
        self,
        way: Way,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        metadata: AttentionMetadata,
        plan: ExchangePlan,
        needs_all_hidden_states: bool,
        own: OwnBlocks | None = None,
    ) -> torch.Tensor:
        assert way.cache is not None, "steps need a cache"
        fetch = self.fetch if way.fetched_layers else None
        context = ForwardContext(way.model.specs, way.cache, self.exchange, self.backend, metadata, fetch, own)
        self.exchange.begin(plan)
        hidden_states = way.model.hidden_states(input_ids, position_ids, context, needs_all_hidden_states)
        self.exchange.end(way.cache.stacks, way.cache.whole_stacks)
        return hidden_states

    def _sample(
        self, way: Way, step: Step, batch: InputBatch, outputs: Outputs, masks: torch.Tensor | None
    ) -> tuple[torch.Tensor, LogprobTensors | None]:
        """→ token ids of all ranks [P * max S], and log-probabilities of those that this rank owns; on the device.

        `masks` [M, W] are those of the step's masked requests.
        A token is sampled by its owner alone, or chosen by every rank of a node from the same candidates.
        """
        everyones, mine = batch.all_sampled_request_idx, batch.sampled_request_idx
        all_token_ids = torch.zeros(len(everyones), dtype=torch.long, device=self.device.torch_device)
        if not len(everyones):
            return all_token_ids, None
        world = self.axes.world
        width = len(everyones) // world.size
        start = world.rank * width
        if outputs.greedy_token_ids is not None:
            state_idx = step.batch.state_idx[everyones[everyones >= 0]]
            if self.states.takes_the_best[state_idx].all():
                of_ranks = _of_each_rank(outputs.greedy_token_ids, world.size)
                return of_ranks.gather(1, batch.all_sampled_row.view(-1, width)).flatten(), None
        words = way.model.words

        def sampled_logits() -> torch.Tensor:
            if outputs.logits is not None:
                return outputs.logits[batch.sampled_idx]
            return way.model.logits(outputs.hidden_states[batch.sampled_idx])

        if batch.plan.by_heads:
            of_node = everyones.reshape(self.axes.node.size, -1)[self.axes.node.rank]
            sampling = self._sampling_batch(step, np.where(of_node >= 0, of_node, everyones.max()), masks)
            if words is not None and not needs_all_logits(sampling):
                candidates = best_of_part(sampled_logits(), words.start, sampling)
                return self._of_nodes(choose(gather(self.axes.gpu, candidates), sampling)), None
            first = self.axes.gpu.rank * width
            logits = self._whole(way, sampled_logits())[first : first + len(mine)]
        elif len(mine):
            logits = sampled_logits()
        my_token_ids, logprobs = all_token_ids[start : start + width], None
        if len(mine):
            my_token_ids[: len(mine)], logprobs = sample(logits, self._sampling_batch(step, mine, masks))
        if batch.plan.by_heads:  # other nodes may have chosen from candidates
            return self._of_nodes(gather(self.axes.gpu, my_token_ids).flatten()), logprobs
        world.all_gather(all_token_ids, my_token_ids)
        return all_token_ids, logprobs

    def _of_nodes(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[n] that all ranks of a node have → [N * n] of all nodes."""
        return token_ids if self.axes.node.size == 1 else gather(self.axes.node, token_ids).flatten()

    def _whole(self, way: Way, logits: torch.Tensor) -> torch.Tensor:
        """Logits [S, vocab_size] of this rank's part of them. Where ranks have parts, all of them call it."""
        if way.model.words is None:
            return logits
        size = -(-way.model.num_words // self.axes.gpu.size)
        parts = gather(self.axes.gpu, F.pad(logits, (0, size - logits.shape[1])))
        return parts.transpose(0, 1).flatten(1)[:, : way.model.num_words]

    def _to_device(self, words: NDArray[np.int32]) -> torch.Tensor:
        """Masks [M, W], without a wait: from memory that is not pinned, a copy would wait for the forward pass."""
        on_cpu, device = torch.from_numpy(words), self.device.torch_device
        return on_cpu if device.type == "cpu" else on_cpu.pin_memory().to(device, non_blocking=True)

    def _sampling_batch(self, step: Step, requests: NDArray[np.int64], masks: torch.Tensor | None) -> SamplingBatch:
        """What the step's `requests` [S] ask for."""
        states, scheduled = self.states, step.batch
        state_idx = scheduled.state_idx[requests]
        params = [p for p in (states.params[i] for i in state_idx) if p is not None]
        positions = (scheduled.num_computed_tokens + scheduled.num_scheduled_tokens)[requests]
        num_prompt_tokens = states.num_prompt_tokens[state_idx]
        mask_idx = np.full(len(scheduled), -1)
        mask_idx[list(step.masked)] = range(len(step.masked))
        ends = list(zip(state_idx.tolist(), num_prompt_tokens.tolist(), positions.tolist(), strict=True))
        return SamplingBatch.build(
            params,
            seeds=states.seeds[state_idx],
            positions=positions,
            prompt_token_ids=[states.token_ids[i, :prompt] for i, prompt, _ in ends],
            output_token_ids=[states.token_ids[i, prompt:end] for i, prompt, end in ends],
            forbidden_token_ids=[
                self._forbidden(p, end - prompt) for p, (_, prompt, end) in zip(params, ends, strict=True)
            ],
            mask_idx=mask_idx[requests],
            masks=masks,
        )

    def _forbidden(self, params: SamplingParams, num_output_tokens: int) -> tuple[int, ...]:
        """Token ids that would end the request before its min_tokens."""
        if num_output_tokens >= params.min_tokens:
            return ()
        eos = () if params.ignore_eos else tuple(self.eos_token_ids)
        return eos + tuple(params.stop_token_ids or ())

    def _prompt_logprobs(
        self, way: Way, step: Step, batch: InputBatch, hidden_states: torch.Tensor
    ) -> list[tuple[int, int, LogprobTensors]]:
        """For each of my rows of a request that asks: log-probabilities of the prompt tokens after its tokens.

        By heads all ranks have all rows, make logits together, and a request's owner keeps them.
        """
        states, bounds = self.states, batch.metadata.query_start_np
        wanted = []
        for row in np.flatnonzero(step.batch.prompt_logprobs[batch.row_request_idx]).tolist():
            i, start = int(batch.row_state_idx[row]), int(batch.row_start[row])
            params = states.params[i]
            assert params is not None
            assert params.prompt_logprobs is not None
            count = min(int(bounds[row + 1] - bounds[row]), int(states.num_prompt_tokens[i]) - 1 - start)
            for first in range(0, count, MAX_PROMPT_LOGPROBS):
                size = min(MAX_PROMPT_LOGPROBS, count - first)
                begin, position = int(bounds[row]) + first, start + first + 1
                logits = self._whole(way, way.model.logits(hidden_states[begin : begin + size]))
                if batch.plan.by_heads and batch.plan.owner[batch.row_request_idx[row]] != self.axes.world.rank:
                    continue
                targets = torch.from_numpy(states.token_ids[i, position : position + size].astype(np.int64))
                targets = targets.to(self.device.torch_device)
                tensors = compute_logprobs(logits, targets, params.prompt_logprobs)
                wanted.append((int(states.numbers[i]), position, tensors))
        return wanted


def _of_each_rank(token_ids: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """[P, V'] of each rank, of each node, or one for all → [P, V']."""
    num_given, num_rows = token_ids.shape
    return token_ids[:, None].expand(num_given, num_ranks // num_given, num_rows).reshape(num_ranks, num_rows)


def fetched_layers(shares: Sequence[LayerShare], specs: Sequence[AttentionSpec], in_decodes: bool = False) -> list[int]:
    """The layers that need more of a KV entry than a rank's share has: all but those whose heads are divided alike.

    In steps of decodes those with whole entries in divided blocks do without, as results over blocks are merged.
    """
    layers = []
    for layer, (share, spec) in enumerate(zip(shares, specs, strict=True)):
        is_enough = spec.entry_width == share.width if share.by_heads else in_decodes and spec.attends_to_all
        if not is_enough:
            layers.append(layer)
    return layers
