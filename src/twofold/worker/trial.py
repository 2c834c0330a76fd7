"""Steps of a GPU rank before it has requests: they show what memory is left for the cache, and what to capture.

The largest step that the scheduler may send is run, sampled in the costliest way, and the largest CUDA graphs are
captured. What both leave of the GPU is the cache's. All ranks run the same trial steps, since they exchange entries.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from twofold.attention.mla import max_attention_bytes
from twofold.attention.spec import LatentSpec
from twofold.config import RuntimeConfig
from twofold.contract import NewRequest, ScheduledBatch, Step
from twofold.sampling_params import SamplingParams
from twofold.worker.cuda_graphs import PREFILL_ROUNDING
from twofold.worker.model_runner import ModelRunner

MIN_TOKENS_TO_CAPTURE, MAX_TOKENS_TO_CAPTURE = PREFILL_ROUNDING[0][0], PREFILL_ROUNDING[-1][0]  # of a rank


class TrialSteps:
    """Runs steps of `runner`, which has a cache of the null block only."""

    def __init__(self, runtime: RuntimeConfig, runner: ModelRunner) -> None:
        self.runtime, self.runner = runtime, runner
        self.num_tokens_to_capture = 0  # of a rank in the longest prefill that is worth a CUDA graph; 0: no graphs

    def measure_room(self) -> int:
        """Bytes left for the cache, of the share of the GPU that the engine may use."""
        runtime = self.runtime
        torch.cuda.reset_peak_memory_stats()
        self._run_largest_step()
        peak = int(torch.cuda.max_memory_allocated() * 1.05)
        # Nothing was cached before that step; expanding a long prefix takes more.
        num_tokens = -(-runtime.max_num_batched_tokens // self.runner.mesh.size)
        latents = (spec for spec in self.runner.model.specs if isinstance(spec, LatentSpec))
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
        shortest = min(2 * self.runner.mesh.size, longest)
        lengths = [shortest] * max(1, min(engine.max_num_seqs, budget // shortest))
        rest = budget - sum(lengths)
        for i in range(len(lengths)):
            more = min(longest - shortest, rest)
            lengths[i], rest = lengths[i] + more, rest - more
        costly = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.1, logprobs=20)
        params = [replace(costly, prompt_logprobs=20), *[costly] * (len(lengths) - 1)]
        self._run_prefill(lengths, params)
        # A decode, so that its kernels are compiled now.
        new = self._new_requests(lengths[:1], params[:1])
        self._run(Step(-1, (), new, {}, ScheduledBatch.of([lengths[0] - 1], [1])))

    def _find_num_tokens_to_capture(self) -> int:
        """The number of tokens a rank below which launching a step takes longer than running it: launches take the same
        time for few tokens as for many."""
        size = self.runner.mesh.size
        many = min(MAX_TOKENS_TO_CAPTURE * size, self.runtime.max_num_batched_tokens)
        launches, busy = self._seconds_of(min(64 * size, many)), self._seconds_of(many)
        wanted = 1.25 * launches / busy * many / size
        mine = torch.tensor([wanted], device=self.runner.device.torch_device)
        everyones = mine.new_empty(size)
        self.runner.mesh.all_gather(everyones, mine)  # graphs have collectives in them: all ranks capture the same
        return int(min(max(float(everyones.max()), MIN_TOKENS_TO_CAPTURE), MAX_TOKENS_TO_CAPTURE))

    def _seconds_of(self, num_tokens: int) -> float:
        """Time of a prefill of so many tokens over all ranks; of the second one, when all kernels are compiled."""
        longest = self.runtime.max_model_len - 1
        full, rest = divmod(num_tokens, longest)
        lengths = ([longest] * full + [rest] * (rest > 0))[: self.runtime.engine.max_num_seqs]
        seconds = 0.0
        for _ in range(2):
            torch.cuda.synchronize()
            start = time.perf_counter()
            self._run_prefill(lengths, [SamplingParams(temperature=0)] * len(lengths))
            seconds = time.perf_counter() - start
        return seconds

    def _measure_graphs(self) -> int:
        """Bytes that CUDA graphs will take: they share memory, as much as the largest one needs."""
        torch.cuda.empty_cache()
        free_before, reserved_before = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
        self.runner.capture_graphs(self.num_tokens_to_capture, only_largest=True)
        torch.cuda.empty_cache()
        pool = torch.cuda.memory_reserved() - reserved_before
        taken = free_before - torch.cuda.mem_get_info()[0]
        graphs, self.runner.graphs = self.runner.graphs, None
        assert graphs is not None
        num_graphs = len(graphs.buckets.decode) + len(graphs.buckets.prefill) + len(graphs.shared_prefix_sizes)
        return int(pool * 1.05) + max(0, taken - pool) * num_graphs // max(1, len(graphs))

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
        """Runs a step, and forgets its requests."""
        self.runner.collect(self.runner.launch(step))
        removed = tuple(new.state_idx for new in step.new)
        self.runner.states.apply(Step(-1, removed, (), {}, step.batch))
