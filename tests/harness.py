"""P ranks as threads of this process: everything but processes and sockets is the real thing, and starts at once.

It lets one test run a hundred models, look into every rank's cache, and compare the collectives that ranks called.
"""

import copy
import itertools
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from twofold.attention.backends import make_backend
from twofold.config import EngineConfig, ModelSource, RuntimeConfig
from twofold.contract import Allocate, Breakdown, Masks, Profile, RankReport, ScheduledBatch, Step, StepResult
from twofold.engine.engine import LLMEngine
from twofold.models.decoder import DecoderModel
from twofold.models.holding import Take, use_stand_ins
from twofold.outputs import RequestOutput
from twofold.parallel.exchange import Exchange
from twofold.parallel.mesh import Axes, SingleRank
from twofold.parallel.sums import make_sum
from twofold.parallel.transport import make_transport
from twofold.sampling_params import SamplingParams
from twofold.worker.model_runner import ModelRunner
from twofold.worker.worker import Rank, Sharding

ANY_COSTS = '{"decode": [[1, 1.0, 1.0]], "prefill": [[1, 1.0, 1.0]]}'
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


class ThreadMemory:
    """Memory of all threads, which read each other's tensors."""

    def __init__(self, mesh: ThreadMesh) -> None:
        self._mesh = mesh

    def allocate(self, num_bytes: int) -> list[torch.Tensor]:
        parts, barrier = self._mesh._parts, self._mesh._barrier
        parts[self._mesh.rank] = torch.zeros(num_bytes, dtype=torch.uint8)
        barrier.wait()
        everyones = list(parts)
        barrier.wait()
        return everyones

    def barrier(self) -> None:
        self._mesh._barrier.wait()


class ThreadChannel:
    """A rank's channel to the engine, as `channel.py: Channel` is between processes."""

    def __init__(self) -> None:
        self.to_rank: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.to_engine: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.engine_waits = threading.Event()
        self._next: list[Any] = []  # received, and not taken yet

    def send(self, message: Any) -> None:
        self.engine_waits.clear()
        self.to_engine.put(message)

    def poll(self, timeout: float) -> bool:
        if not self._next:
            with suppress(queue.Empty):
                self._next.append(self.to_rank.get(timeout=timeout) if timeout else self.to_rank.get_nowait())
        return bool(self._next)

    def recv(self) -> Any:
        message = self._next.pop() if self._next else self.to_rank.get()
        if message is None:
            raise EOFError
        return message


class LaggingDevice:
    """A CPU that reports steps as done only when the engine waits for them, like a GPU some time after a launch.

    So with two steps in flight the second is launched before the first one's tokens are read.
    """

    torch_device = torch.device("cpu")

    def __init__(self, engine_waits: threading.Event) -> None:
        self._engine_waits = engine_waits

    def record(self) -> "LaggingDevice":
        return self

    def query(self) -> bool:
        return self._engine_waits.is_set()

    def synchronize(self) -> None:
        pass


class ThreadExecutor:
    """The executor's interface over threads. Each thread runs a rank's own loop. Ranks share one model's weights."""

    def __init__(self, model: PreTrainedModel, runtime: RuntimeConfig, num_blocks: int) -> None:
        self.runtime = runtime
        size = runtime.num_ranks
        weights = {id(tensor): tensor for tensor in model.parameters()}
        self.barriers: list[threading.Barrier] = []
        self.axes = self._make_axes(runtime)
        self.meshes = [axes.world for axes in self.axes]
        self.channels = [ThreadChannel() for _ in range(size)]

        def read(take: Take) -> None:
            for name, tensor in model.state_dict().items():
                take(name, tensor)

        def start(axes: Axes, channel: ThreadChannel) -> tuple[Rank, RankReport]:
            device, mesh = LaggingDevice(channel.engine_waits), axes.gpu
            transport = make_transport("auto", axes, device.torch_device, 0, -1)
            mine = copy.deepcopy(model, memo=dict(weights))
            if runtime.weights == "sharded":
                use_stand_ins(mine, device.torch_device)
            total = make_sum(mesh, device.torch_device, 0, -1)
            peers = ThreadMemory(mesh) if isinstance(mesh, ThreadMesh) else None
            memory = peers if runtime.num_nodes == 1 else None
            sharding = Sharding(read, peers) if runtime.weights == "sharded" else None
            exchange, backend = Exchange(mesh, transport, axes.node), make_backend("sdpa")
            rank = Rank(runtime, DecoderModel(mine), axes, exchange, total, backend, device, memory, sharding)
            report = replace(rank.report(), num_blocks=num_blocks)
            sharded = None if report.sharded is None else replace(report.sharded, num_blocks=size * num_blocks)
            return rank, replace(report, sharded=sharded)

        with ThreadPoolExecutor(size) as threads:
            started = list(threads.map(start, self.axes, self.channels))
        self.ranks, self.reports = map(list, zip(*started, strict=True))
        self.steps: list[Step] = []
        self._threads: list[threading.Thread] = []
        self.results: list[list[StepResult]] = []  # of each step, by rank

    def _make_axes(self, runtime: RuntimeConfig) -> list[Axes]:
        """Of each rank."""

        def meshes(size: int) -> list[Any]:
            if size == 1:
                return [SingleRank()]
            barrier = threading.Barrier(size, timeout=120)  # a rank that skips a collective fails the test
            self.barriers.append(barrier)
            parts: list[Any] = [None] * size
            return [ThreadMesh(rank, parts, barrier) for rank in range(size)]

        world = meshes(runtime.num_ranks)
        if runtime.num_nodes == 1:
            return [Axes.of_one_node(mesh) for mesh in world]
        gpu = [mesh for _ in range(runtime.num_nodes) for mesh in meshes(runtime.ranks_per_node)]
        node = [meshes(runtime.num_nodes) for _ in range(runtime.ranks_per_node)]
        return [
            Axes(world[rank], gpu[rank], node[rank % runtime.ranks_per_node][rank // runtime.ranks_per_node])
            for rank in range(runtime.num_ranks)
        ]

    @property
    def models(self) -> list[DecoderModel]:
        return [rank.model for rank in self.ranks]

    @property
    def runners(self) -> list[ModelRunner]:
        return [rank.runner for rank in self.ranks]

    def allocate(self, num_blocks: int, is_sharded: bool, times_layouts: bool) -> str | None:
        message = Allocate(num_blocks, is_sharded, times_layouts)
        with ThreadPoolExecutor(len(self.ranks)) as threads:
            answers = list(threads.map(lambda rank: rank.allocate(message), self.ranks))
        self._threads = [
            threading.Thread(target=self._serve, args=(rank, channel), daemon=True)
            for rank, channel in zip(self.ranks, self.channels, strict=True)
        ]
        for thread in self._threads:
            thread.start()
        return answers[0].step_costs

    def _serve(self, rank: Rank, channel: ThreadChannel) -> None:
        try:
            rank.serve(channel)
        except EOFError:
            pass
        except BaseException as error:
            for barrier in self.barriers:
                barrier.abort()
            channel.send(error)

    def submit(self, step: Step) -> None:
        self.steps.append(step)
        self._send(step)

    def submit_masks(self, masks: Masks) -> None:
        self._send(masks)

    def collect(self, timeout: float | None = None) -> list[StepResult]:
        results: list[StepResult] = self._receive()
        self.results.append(results)
        return results

    def profile(self, start: bool) -> list[Breakdown | None]:
        self._send(Profile(start))
        return [answer.breakdown for answer in self._receive()]

    def _send(self, message: Any) -> None:
        for channel in self.channels:
            channel.to_rank.put(message)

    def _receive(self) -> list[Any]:
        for channel in self.channels:
            channel.engine_waits.set()
        answers = [channel.to_engine.get() for channel in self.channels]
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return answers

    def check(self) -> None:
        pass

    def kill(self) -> None:
        pass

    def shutdown(self) -> None:
        self._send(None)
        for thread in self._threads:
            thread.join()


def make_engine(
    model: PreTrainedModel,
    num_ranks: int,
    *,
    num_nodes: int = 1,
    max_model_len: int = 256,
    max_num_batched_tokens: int = 4096,
    num_blocks: int | None = None,
    block_size: int = 16,
    eos_token_ids: frozenset[int] = frozenset(),
    steps_in_flight: int = 1,
    step_layout: str = "mixed",
    tokenizer: PreTrainedTokenizerBase | None = None,
    **engine_args: Any,
) -> LLMEngine:
    """An engine on `num_ranks` threads for a model in memory.

    `num_blocks` are those of a replicated cache; of a sharded one there are so many for each rank.

    The layout "mixed" changes from step to step, wherever the model divides.
    """
    engine_args["step_layout"] = "auto" if step_layout == "mixed" else step_layout
    if step_layout == "mixed":
        engine_args["step_costs"] = ANY_COSTS  # not measured; `mixed` decides in their place
    runtime = RuntimeConfig(
        engine=EngineConfig(model="in-memory", prefill_context_parallel_size=num_ranks, **engine_args),
        source=ModelSource("in-memory"),
        model_config=PretrainedConfig(),
        device="cpu",
        dtype=model.dtype,
        max_model_len=max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        kv_cache=engine_args.get("kv_cache", "replicated") if num_ranks > 1 else "replicated",
        attention_backend="sdpa",
        weights="sharded" if engine_args.get("weights") == "sharded" and num_ranks > 1 else "replicated",
        eos_token_ids=eos_token_ids,
        num_threads=1,
        num_nodes=num_nodes,
    )
    if num_blocks is None:
        num_blocks = 4 * -(-max_model_len // block_size) + 1
    engine_class = MixedEngine if step_layout == "mixed" else LLMEngine
    engine = engine_class(runtime, tokenizer, lambda start_timeout: ThreadExecutor(model, runtime, num_blocks))
    engine.max_steps_in_flight = steps_in_flight
    return engine


class MixedEngine(LLMEngine):
    """Changes the layout from step to step, with new ranks for lost ones, too."""

    def _choose_layouts(self, num_blocks: int) -> None:
        super()._choose_layouts(num_blocks)
        if self.reports[0].only_by_tokens is None:
            self.runs_by_heads = mixed
            self._decodes_fetch = True  # some of them run by tokens


def mixed(batch: ScheduledBatch) -> bool:
    """Whether a step runs by heads: for about half of all batches, the same on every rank."""
    seen = (batch.num_computed_tokens.sum() + batch.num_scheduled_tokens.sum()) * 2654435761 + len(batch)
    return bool(seen >> 7 & 1)


def generate(
    engine: LLMEngine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    after_step: Callable[[int], object] = lambda num_steps: None,
) -> list[RequestOutput]:
    """Answers token-id prompts; outputs in their order. The engine must be idle before and is idle after.

    `after_step` gets the number of steps so far.
    """
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    for number, (prompt, one) in enumerate(zip(prompts, each, strict=True)):
        engine.add_request(f"prompt-{number}", list(prompt), one)
    finished: dict[str, RequestOutput] = {}
    for num_steps in itertools.count(1):
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output
        if not engine.has_unfinished_requests and not engine.scheduler.num_in_flight:
            break
        after_step(num_steps)
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
