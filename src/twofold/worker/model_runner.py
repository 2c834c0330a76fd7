"""One rank's steps: prepare, forward, sample. `launch` enqueues a step, `collect` waits for its tokens."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from twofold.attention.backends.base import AttentionBackend
from twofold.attention.metadata import AttentionMetadata
from twofold.attention.mla import piece_tokens
from twofold.attention.op import ForwardContext, forward_context
from twofold.attention.spec import LatentSpec
from twofold.contract import Step, StepResult
from twofold.kv.cache import KVCache
from twofold.models.loader import DecoderModel
from twofold.parallel.exchange import Exchange, ExchangePlan
from twofold.parallel.mesh import Mesh
from twofold.sampling_params import SamplingParams
from twofold.worker.cuda_graphs import CUDAGraphs
from twofold.worker.input_batch import InputBatch, prepare
from twofold.worker.request_states import RequestStates
from twofold.worker.sampler import LogprobTensors, SamplingBatch, compute_logprobs, sample

PROMPT_LOGPROB_ROWS = 512  # positions whose logits over the vocabulary are held at once


@dataclass(slots=True)
class LaunchedStep:
    """A step whose tokens may not be on the CPU yet."""

    step: Step
    batch: InputBatch
    all_token_ids: torch.Tensor  # [P * max S] on the CPU, once `ready`
    logprobs: LogprobTensors | None  # of my sampled rows
    prompt_logprobs: dict[str, list[tuple[int, LogprobTensors]]]
    ready: torch.cuda.Event | None


class ModelRunner:
    """Runs steps on one rank. Every rank runs the same steps in the same order."""

    def __init__(
        self,
        model: DecoderModel,
        cache: KVCache,
        states: RequestStates,
        mesh: Mesh,
        exchange: Exchange,
        backend: AttentionBackend,
        policy: str,
        eos_token_ids: frozenset[int],
        device: torch.device,
    ) -> None:
        self.model, self.cache, self.states = model, cache, states
        self.mesh, self.exchange, self.backend, self.policy = mesh, exchange, backend, policy
        self.eos_token_ids, self.device = eos_token_ids, device
        self.graphs: CUDAGraphs | None = None

    @torch.inference_mode()
    def launch(self, step: Step) -> LaunchedStep:
        """Enqueues one step."""
        self.states.apply(step)
        batch = prepare(
            step.batch, self.states, self.mesh.rank, self.mesh.size, self.policy, self.cache.block_size, self._pad
        )
        hidden_states = self._forward(batch)
        tokens, logprobs = self._sample(step, batch, hidden_states)
        prompt_logprobs = self._prompt_logprobs(step, batch, hidden_states)
        return self._publish_tokens(step, batch, tokens, logprobs, prompt_logprobs)

    def collect(self, launched: LaunchedStep) -> StepResult:
        """Waits for a launched step; notes its tokens and returns those that this rank sampled."""
        step, batch = launched.step, launched.batch
        if launched.ready is not None:
            launched.ready.synchronize()
        request_ids = step.batch.request_ids
        token_ids: NDArray[np.int64] = launched.all_token_ids.numpy()
        sampled = batch.all_sampled_request_idx
        self.states.append_sampled(tuple(request_ids[i] for i in sampled[sampled >= 0]), token_ids[sampled >= 0])
        start = self.mesh.rank * (len(sampled) // self.mesh.size)
        mine = batch.sampled_request_idx
        return StepResult(
            step_id=step.step_id,
            rank=self.mesh.rank,
            request_ids=tuple(request_ids[i] for i in mine),
            token_ids=token_ids[start : start + len(mine)].astype(np.int32),
            logprobs=launched.logprobs.to_numpy() if launched.logprobs is not None else None,
            prompt_logprobs={
                request_id: [(position, tensors.to_numpy()) for position, tensors in pieces]
                for request_id, pieces in launched.prompt_logprobs.items()
            },
            num_pairs=int(batch.partition.num_pairs[self.mesh.rank]),
            exchange_bytes=self.exchange.num_bytes,
            exchange_seconds=self.exchange.num_seconds,
        )

    def needs_tokens_on_cpu(self, step: Step) -> bool:
        """Whether the step samples with penalties, which count tokens on the CPU: earlier steps must be collected."""
        states = self.states
        params = [new.sampling_params for new in step.new]
        params += [p for p in states.params if p is not None]
        return any(_counts_tokens(p) for p in params)

    def capture_graphs(self) -> None:
        """Records CUDA graphs of short steps; the cache must stay where it is from now on."""
        states, dtype = self.states, self.cache.blocks[0].dtype
        kinds = [
            is_decode
            for is_decode in (False, True)
            if all(self.backend.can_capture(spec, dtype, is_decode) for spec in self.model.specs)
        ]
        if not kinds:
            return
        copied = [piece_tokens(spec, dtype.itemsize) for spec in self.model.specs if isinstance(spec, LatentSpec)]
        graphs = CUDAGraphs(
            self._forward_eager, self.mesh.size, states.max_num_seqs, states.block_tables.shape[1],
            self.cache.block_size, min(copied) if copied else None, self.exchange, self.device,
        )  # fmt: skip
        with torch.inference_mode():
            for is_decode in kinds:
                # The largest first: the smaller ones fit into its memory.
                for size in reversed(graphs.decode_sizes if is_decode else graphs.prefill_sizes):
                    graphs.record(size, is_decode)
        self.graphs = graphs

    def _pad(self, num_tokens: int, is_decode: bool) -> int:
        return num_tokens if self.graphs is None else self.graphs.pad(num_tokens, is_decode)

    def _forward(self, batch: InputBatch) -> torch.Tensor:
        """→ hidden states [N, hidden_size], or [V', hidden_size] of each row's last token if the batch reads no others.

        A rank without tokens runs padding and joins the exchange.
        """
        if self.graphs is not None and (hidden_states := self.graphs.replay(batch)) is not None:
            return hidden_states
        return self._forward_eager(
            batch.input_ids, batch.position_ids, batch.metadata, batch.exchange, batch.needs_all_hidden_states
        )

    def _forward_eager(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        metadata: AttentionMetadata,
        plan: ExchangePlan,
        needs_all_hidden_states: bool,
    ) -> torch.Tensor:
        read = None if needs_all_hidden_states else metadata.last_token_idx()  # [V']
        last = metadata.of_last_tokens() if read is not None and self.model.last_layer is not None else None
        self.exchange.begin(plan)
        with forward_context(ForwardContext(self.model.specs, self.cache, self.exchange, self.backend, metadata, last)):
            hidden_states = self.model.hidden_states(input_ids, position_ids, read)
        self.exchange.end(self.cache.stacks)
        return hidden_states

    def _sample(
        self, step: Step, batch: InputBatch, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, LogprobTensors | None]:
        """Samples the rows that this rank owns → token ids [S], on the device."""
        if not len(batch.sampled_request_idx):
            return torch.empty(0, dtype=torch.long, device=self.device), None
        logits = self.model.logits(hidden_states[batch.sampled_idx])
        return sample(logits, self._sampling_batch(step, batch))

    def _sampling_batch(self, step: Step, batch: InputBatch) -> SamplingBatch:
        states = self.states
        requests = batch.sampled_request_idx
        lines = batch.state_idx[requests]
        params = [p for p in (states.params[line] for line in lines) if p is not None]
        positions = (step.batch.num_computed_tokens + step.batch.num_scheduled_tokens)[requests]
        num_prompt_tokens = states.num_prompt_tokens[lines]
        ends = list(zip(lines.tolist(), num_prompt_tokens.tolist(), positions.tolist(), strict=True))
        return SamplingBatch.build(
            params,
            seeds=states.seeds[lines],
            positions=positions,
            prompt_token_ids=[states.token_ids[line, :prompt] for line, prompt, _ in ends],
            output_token_ids=[states.token_ids[line, prompt:end] for line, prompt, end in ends],
            forbidden_token_ids=[
                self._forbidden(p, end - prompt) for p, (_, prompt, end) in zip(params, ends, strict=True)
            ],
        )

    def _forbidden(self, params: SamplingParams, num_output_tokens: int) -> tuple[int, ...]:
        """What would end the request before its min_tokens."""
        if num_output_tokens >= params.min_tokens:
            return ()
        eos = () if params.ignore_eos else tuple(self.eos_token_ids)
        return eos + tuple(params.stop_token_ids or ())

    def _prompt_logprobs(
        self, step: Step, batch: InputBatch, hidden_states: torch.Tensor
    ) -> dict[str, list[tuple[int, LogprobTensors]]]:
        """For each of my rows whose request asks: log-probabilities of the prompt tokens that follow its tokens."""
        states, bounds = self.states, batch.metadata.query_start_np
        wanted: dict[str, list[tuple[int, LogprobTensors]]] = {}
        lines = batch.state_idx[batch.row_request_idx]
        for row in np.flatnonzero(states.wants_prompt_logprobs[lines]).tolist():
            line, start = int(lines[row]), int(batch.row_start[row])
            params = states.params[line]
            assert params is not None
            assert params.prompt_logprobs is not None
            count = min(int(bounds[row + 1] - bounds[row]), int(states.num_prompt_tokens[line]) - 1 - start)
            for first in range(0, count, PROMPT_LOGPROB_ROWS):
                size = min(PROMPT_LOGPROB_ROWS, count - first)
                begin = int(bounds[row]) + first
                targets = states.token_ids[line, start + first + 1 : start + first + 1 + size].astype(np.int64)
                tensors = compute_logprobs(
                    self.model.logits(hidden_states[begin : begin + size]),
                    torch.from_numpy(targets).to(self.device),
                    params.prompt_logprobs,
                )
                request_id = step.batch.request_ids[batch.row_request_idx[row]]
                wanted.setdefault(request_id, []).append((start + first + 1, tensors))
        return wanted

    def _publish_tokens(
        self,
        step: Step,
        batch: InputBatch,
        tokens: torch.Tensor,
        logprobs: LogprobTensors | None,
        prompt_logprobs: dict[str, list[tuple[int, LogprobTensors]]],
    ) -> LaunchedStep:
        """Every rank receives the tokens that the owners sampled; nobody samples them again."""
        sampled = batch.all_sampled_request_idx
        gathered = torch.zeros(len(sampled), dtype=torch.long, device=self.device)
        ready = None
        if len(sampled):
            start, width = self.mesh.rank * (len(sampled) // self.mesh.size), len(sampled) // self.mesh.size
            mine = gathered[start : start + width]
            mine[: len(tokens)] = tokens
            self.mesh.all_gather(gathered, mine)
            self.states.last_sampled[batch.all_sampled_state_idx] = gathered
        if self.device.type != "cpu":
            gathered = gathered.to("cpu", non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        return LaunchedStep(step, batch, gathered, logprobs, prompt_logprobs, ready)


def _counts_tokens(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)
