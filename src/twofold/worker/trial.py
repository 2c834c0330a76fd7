"""Steps of a rank before it has requests: what memory is left for the cache, what to capture, what each layout costs.

The largest step that the scheduler may send is run, sampled in the costliest way, and the largest CUDA graphs are
captured. What both leave of the GPU is the cache's. All ranks run the same trial steps, since they exchange entries.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from twofold.attention.mla import max_attention_bytes
from twofold.attention.spec import LatentSpec
from twofold.config import RuntimeConfig
from twofold.contract import NewRequest, ScheduledBatch, Step
from twofold.parallel.costs import StepCosts
from twofold.parallel.mesh import gather
from twofold.sampling_params import SamplingParams
from twofold.worker.cuda_graphs import HEADS_PREFILL, PREFILL_ROUNDING
from twofold.worker.model_runner import ModelRunner

MIN_TOKENS_TO_CAPTURE, MAX_TOKENS_TO_CAPTURE = PREFILL_ROUNDING[0][0], PREFILL_ROUNDING[-1][0]  # of a rank

# Numbers of tokens whose steps are timed in both layouts; between them costs are interpolated.
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "cuda": {"decode": (1, 4, 16, 64, 256), "prefill": (16, 64, 256, 512, 1024, 2048)},
    "cpu": {"decode": (1, 8), "prefill": (16, 64)},
}
NUM_RUNS = {"cuda": 4, "cpu": 2}  # of a step that is timed; the fastest counts, so not the one that compiles kernels


class TrialSteps:
    """Runs steps of `runner`, which has a cache of the null block only."""

    def __init__(self, runtime: RuntimeConfig, runner: ModelRunner) -> None:
        self.runtime, self.runner = runtime, runner
        self._by_heads = False  # the layout of trial steps
        self.num_tokens_to_capture = 0  # of a rank in the longest prefill that is worth a CUDA graph; 0: no graphs

    def measure_room(self) -> int:
        """Bytes left for the cache, of the share of the GPU that the engine may use."""
        runtime = self.runtime
        torch.cuda.reset_peak_memory_stats()
        for self._by_heads in {runtime.engine.step_layout == "heads", False}:
            self._run_largest_step()
        if self.runner.by_heads is not None:
            self._by_heads = True
            self._run_tokens(HEADS_PREFILL[-1])
            self._by_heads = False
        peak = int(torch.cuda.max_memory_allocated() * 1.05)
        # Nothing was cached before that step; expanding a long prefix takes more.
        num_tokens = -(-runtime.max_num_batched_tokens // self.runner.axes.world.size)
        latents = (spec for spec in self.runner.by_tokens.model.specs if isinstance(spec, LatentSpec))
        peak += max((max_attention_bytes(spec, num_tokens) for spec in latents), default=0)
        if not runtime.engine.enforce_eager:
            self.num_tokens_to_capture = self._find_num_tokens_to_capture()
            peak += self._measure_graphs()
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        held_by_others = total - free - torch.cuda.memory_reserved()
        torch.cuda.empty_cache()
        return max(0, int(total * runtime.engine.gpu_memory_utilization) - held_by_others - peak)

    def _run_largest_step(self) -> None:
        """Runs max_num_batched_tokens tokens in as many requests as may run. One rank samples all of them, with all
        features of sampling.

        That needs two tokens a rank in each request: shorter requests are spread over the ranks.
        """
        runtime, engine = self.runtime, self.runtime.engine
        budget, longest = runtime.max_num_batched_tokens, min(runtime.max_model_len - 1, runtime.max_num_batched_tokens)
        shortest = min(2 * self.runner.axes.world.size, longest)
        lengths = [shortest] * max(1, min(engine.max_num_seqs, budget // shortest))
        rest = budget - sum(lengths)
        for i in range(len(lengths)):
            more = min(longest - shortest, rest)
            lengths[i], rest = lengths[i] + more, rest - more
        most = self.runner.by_tokens.model.vocab_size if engine.max_logprobs == -1 else engine.max_logprobs
        costly = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.1, logprobs=most)
        params = [replace(costly, prompt_logprobs=most), *[costly] * (len(lengths) - 1)]
        self._run_prefill(lengths, params)
        # A decode, so that its kernels are compiled now.
        new = self._new_requests(lengths[:1], params[:1])
        self._run(Step(-1, (), new, {}, ScheduledBatch.of([lengths[0] - 1], [1])))

    def measure_costs(self) -> StepCosts:
        """Milliseconds of steps in either layout; of the slowest rank, so the same on every rank."""
        kind_of_device = self.runner.device.torch_device.type
        sizes, num_runs = SIZES[kind_of_device], NUM_RUNS[kind_of_device]
        most = {
            "decode": self.runtime.engine.max_num_seqs,
            "prefill": min(self.runtime.max_num_batched_tokens, self.runtime.max_model_len - 1),
        }
        kinds = {kind: [size for size in sizes[kind] if size <= limit] or [1] for kind, limit in most.items()}
        seconds = []
        for self._by_heads in (False, True):
            seconds += [self._seconds_of_decodes(size, num_runs) for size in kinds["decode"]]
            seconds += [self._seconds_of(size, num_runs) for size in kinds["prefill"]]
        mine = torch.tensor(seconds, dtype=torch.float64, device=self.runner.device.torch_device)
        slowest = gather(self.runner.axes.world, mine).amax(dim=0).mul(1e3).tolist()
        tokens, heads = ([round(ms, 3) for ms in part] for part in np.array(slowest).reshape(2, -1).tolist())
        points = list(zip(kinds["decode"] + kinds["prefill"], tokens, heads, strict=True))
        num_decode = len(kinds["decode"])
        num_nodes = self.runner.axes.node.size
        return StepCosts(tuple(points[:num_decode]), tuple(points[num_decode:]), num_nodes)

    def _find_num_tokens_to_capture(self) -> int:
        """The number of tokens a rank below which launching a step takes longer than running it: launches take the same
        time for few tokens as for many."""
        size = self.runner.axes.world.size
        many = min(MAX_TOKENS_TO_CAPTURE * size, self.runtime.max_num_batched_tokens)
        launches, busy = self._seconds_of(min(64 * size, many)), self._seconds_of(many)
        wanted = 1.25 * launches / busy * many / size
        mine = torch.tensor([wanted], device=self.runner.device.torch_device)
        everyones = gather(self.runner.axes.world, mine)  # graphs have collectives in them: all capture the same
        return int(min(max(float(everyones.max()), MIN_TOKENS_TO_CAPTURE), MAX_TOKENS_TO_CAPTURE))

    def _seconds_of_decodes(self, num_requests: int, num_runs: int) -> float:
        """Time of a step of so many decodes."""
        new = self._new_requests([2] * num_requests, [SamplingParams(temperature=0)] * num_requests)
        step = Step(-1, (), new, {}, ScheduledBatch.of([1] * num_requests, [1] * num_requests))
        return _least_seconds(lambda: self._run(step), num_runs)

    def _seconds_of(self, num_tokens: int, num_runs: int = 2) -> float:
        """Time of a prefill of so many tokens over all ranks."""
        return _least_seconds(lambda: self._run_tokens(num_tokens), num_runs)

    def _run_tokens(self, num_tokens: int) -> None:
        """Runs a prefill of so many tokens, in as few requests as can have them."""
        longest = self.runtime.max_model_len - 1
        full, rest = divmod(min(num_tokens, self.runtime.max_num_batched_tokens), longest)
        lengths = ([longest] * full + [rest] * (rest > 0))[: self.runtime.engine.max_num_seqs]
        self._run_prefill(lengths, [SamplingParams(temperature=0)] * len(lengths))

    def _measure_graphs(self) -> int:
        """Bytes that CUDA graphs will take: they share memory, as much as the largest one needs."""
        torch.cuda.empty_cache()
        free_before, reserved_before = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
        self.runner.capture_graphs(self.num_tokens_to_capture, only_largest=True)
        torch.cuda.empty_cache()
        pool = torch.cuda.memory_reserved() - reserved_before
        taken = free_before - torch.cuda.mem_get_info()[0]
        num_graphs, num_captured = 0, 0
        for way in self.runner.ways:
            graphs, way.graphs = way.graphs, None
            assert graphs is not None
            num_captured += len(graphs)
            num_graphs += len(graphs.buckets.decode) + len(graphs.buckets.prefill) + len(graphs.shared_prefix_sizes)
        return int(pool * 1.05) + max(0, taken - pool) * num_graphs // max(1, num_captured)

    def _run_prefill(self, lengths: Sequence[int], params: Sequence[SamplingParams]) -> None:
        asks = np.array([one.prompt_logprobs is not None for one in params])
        batch = replace(ScheduledBatch.of([0] * len(lengths), lengths), prompt_logprobs=asks)
        self._run(Step(-1, (), self._new_requests(lengths, params), {}, batch))

    def _new_requests(self, lengths: Sequence[int], params: Sequence[SamplingParams]) -> tuple[NewRequest, ...]:
        return tuple(
            NewRequest(i, i, np.zeros(length, np.int32), length, [], one, 0)
            for i, (length, one) in enumerate(zip(lengths, params, strict=True))
        )

    def _run(self, step: Step) -> None:
        """Runs a step to its end, and forgets its requests."""
        self.runner.collect(self.runner.launch(replace(step, by_heads=self._by_heads)))
        removed = tuple(new.state_idx for new in step.new)
        self.runner.states.apply(Step(-1, removed, (), {}, step.batch))


def _least_seconds(run: Callable[[], None], num_runs: int) -> float:
    times = []
    for _ in range(num_runs):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
