"""P ranks as threads of this process: everything but processes and sockets is the real thing, and starts at once.

It lets one test run a hundred models, look into every rank's cache, and compare the collectives that ranks called.
"""

import copy
import queue
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from twofold.attention.backends import make_backend
from twofold.config import EngineConfig, RuntimeConfig
from twofold.contract import RankReport, Step, StepResult
from twofold.engine.engine import LLMEngine
from twofold.kv.cache import KVCache, bytes_per_block
from twofold.models.loader import DecoderModel
from twofold.models.source import ModelSource
from twofold.outputs import RequestOutput
from twofold.parallel.exchange import AllGatherExchange
from twofold.sampling_params import SamplingParams
from twofold.worker.model_runner import LaunchedStep, ModelRunner
from twofold.worker.request_states import RequestStates

COLLECT = "collect"  # to a rank: the engine waits for the next answer
SURE = 1e-3  # a lead in logits that rounding does not turn around


class ThreadMesh:
    """A mesh of threads; `calls` notes the shape of every collective, which all ranks must agree on."""

    def __init__(self, rank: int, parts: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(parts)
        self._parts, self._barrier = parts, barrier
        self.calls: list[tuple[int, ...]] = []

    def all_gather(self, gathered: torch.Tensor, mine: torch.Tensor) -> None:
        self.calls.append(tuple(mine.shape))
        self._parts[self.rank] = mine.clone()
        self._barrier.wait()
        gathered.copy_(torch.cat(self._parts))
        self._barrier.wait()

    def close(self) -> None:
        pass


class ThreadExecutor:
    """The executor's interface over threads. Ranks share the weights of one model."""

    def __init__(self, model: PreTrainedModel, runtime: RuntimeConfig, num_blocks: int) -> None:
        self.runtime = runtime
        weights = {id(tensor): tensor for tensor in model.parameters()}
        self.models = [DecoderModel(copy.deepcopy(model, memo=dict(weights))) for _ in range(runtime.num_ranks)]
        self.entry_widths = [spec.entry_width for spec in self.models[0].specs]
        block_bytes = bytes_per_block(self.entry_widths, runtime.block_size, runtime.dtype)
        self.reports = [
            RankReport(rank, num_blocks, block_bytes, self.models[0].vocab_size, num_parameters=10**6)
            for rank in range(runtime.num_ranks)
        ]
        self.steps: list[Step] = []
        self.results: list[list[StepResult]] = []  # of each step, by rank

    def allocate(self, num_blocks: int) -> None:
        runtime = self.runtime
        size, device = runtime.num_ranks, torch.device("cpu")
        self.barrier = threading.Barrier(size, timeout=120)  # a rank that skips a collective fails the test
        parts: list[Any] = [None] * size
        self.meshes = [ThreadMesh(rank, parts, self.barrier) for rank in range(size)]
        self.runners = [
            ModelRunner(
                model=model,
                cache=KVCache(self.entry_widths, num_blocks, runtime.block_size, runtime.dtype, device),
                states=RequestStates(runtime.engine.max_num_seqs, runtime.max_model_len, runtime.block_size, device),
                mesh=mesh,
                exchange=AllGatherExchange(mesh, device),
                backend=make_backend("sdpa"),
                policy=runtime.engine.partition_policy,
                eos_token_ids=runtime.eos_token_ids,
                device=device,
            )
            for model, mesh in zip(self.models, self.meshes, strict=True)
        ]
        self._inboxes: list[queue.SimpleQueue[Step | str | None]] = [queue.SimpleQueue() for _ in range(size)]
        self._outboxes: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(size)]
        self._threads = [threading.Thread(target=self._serve, args=(rank,), daemon=True) for rank in range(size)]
        for thread in self._threads:
            thread.start()

    def _serve(self, rank: int) -> None:
        """As a worker does: with two steps in flight, the second is launched before the first one's tokens are read."""
        runner, inbox, outbox = self.runners[rank], self._inboxes[rank], self._outboxes[rank]
        pending: LaunchedStep | None = None
        num_due = 0  # answers that the engine waits for
        try:
            while (message := inbox.get()) is not None:
                if isinstance(message, Step):
                    if pending is not None and runner.needs_tokens_on_cpu(message):
                        outbox.put(runner.collect(pending))
                        pending, num_due = None, num_due - 1
                    launched = runner.launch(message)
                    if pending is not None:
                        outbox.put(runner.collect(pending))
                        num_due -= 1
                    pending = launched
                else:
                    num_due += 1
                if pending is not None and num_due > 0:
                    outbox.put(runner.collect(pending))
                    pending, num_due = None, num_due - 1
        except BaseException as error:
            self.barrier.abort()
            outbox.put(error)

    def submit(self, step: Step) -> None:
        self.steps.append(step)
        for inbox in self._inboxes:
            inbox.put(step)

    def collect(self, timeout: float | None = None) -> list[StepResult]:
        for inbox in self._inboxes:
            inbox.put(COLLECT)
        results = [outbox.get() for outbox in self._outboxes]
        errors = [result for result in results if isinstance(result, BaseException)]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        self.results.append(results)
        return results

    def check(self) -> None:
        pass

    def shutdown(self) -> None:
        for inbox in self._inboxes:
            inbox.put(None)
        for thread in self._threads:
            thread.join()


def make_engine(
    model: PreTrainedModel,
    num_ranks: int,
    *,
    max_model_len: int = 256,
    max_num_batched_tokens: int = 4096,
    num_blocks: int | None = None,
    block_size: int = 16,
    eos_token_ids: frozenset[int] = frozenset(),
    steps_in_flight: int = 1,
    **engine_args: Any,
) -> LLMEngine:
    """An engine on `num_ranks` threads for a model in memory."""
    runtime = RuntimeConfig(
        engine=EngineConfig(model="in-memory", prefill_context_parallel_size=num_ranks, **engine_args),
        source=ModelSource("in-memory"),
        model_config=PretrainedConfig(),
        device="cpu",
        dtype=model.dtype,
        max_model_len=max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        attention_backend="sdpa",
        eos_token_ids=eos_token_ids,
        num_threads=1,
    )
    if num_blocks is None:
        num_blocks = 4 * -(-max_model_len // block_size) + 1
    engine = LLMEngine(runtime, None, ThreadExecutor(model, runtime, num_blocks))
    engine.max_steps_in_flight = steps_in_flight
    return engine


def generate(
    engine: LLMEngine, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
) -> list[RequestOutput]:
    """Answers token-id prompts; outputs in their order. The engine must be idle before and is idle after."""
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    for number, (prompt, one) in enumerate(zip(prompts, each, strict=True)):
        engine.add_request(f"prompt-{number}", list(prompt), one)
    finished: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests or engine.scheduler.num_in_flight:
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output
    assert engine.is_idle
    return [finished[f"prompt-{number}"] for number in range(len(prompts))]


def prompt_logprobs(engine: LLMEngine, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Log-probability of each prompt's tokens from the second on, as the engine computes them."""
    outputs = generate(engine, prompts, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    values = []
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        entries = [entry[token] for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True) if entry]
        values.append(np.array([entry.logprob for entry in entries]))
        assert len(values[-1]) == len(prompt) - 1
    return values


@torch.no_grad()
def reference_logprobs(model: PreTrainedModel, prompt: Sequence[int]) -> np.ndarray:
    """The same from Transformers' own forward of the whole prompt."""
    ids = torch.tensor([list(prompt)])
    # Without this mask the eager code of some families sees both ways; `generate` always gives it.
    logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].float()
    chosen = logits[:-1].log_softmax(-1).gather(-1, torch.tensor(list(prompt[1:]))[:, None])
    return chosen[:, 0].numpy()


@torch.no_grad()
def reference_continuation(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """Transformers' greedy tokens, as far as each is clear."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        ids = torch.tensor([tokens])
        best = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1].topk(2)
        if best.values[0] - best.values[1] < SURE:
            break
        tokens.append(int(best.indices[0]))
    return tokens[len(prompt) :]
