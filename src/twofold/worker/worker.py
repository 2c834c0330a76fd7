"""One rank: it loads the model, measures its memory, then carries out the engine's steps until the engine goes away.

A rank is given its parts: model, mesh, exchange, backend and device, then a channel to the engine. `main` makes the
real ones in a process of its own.
"""

import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.dynamic_module_utils import init_hf_modules

from twofold.attention.backends import make_backend
from twofold.attention.backends.base import AttentionBackend
from twofold.attention.mla import max_attention_bytes
from twofold.attention.spec import AttentionSpec, LatentSpec
from twofold.channel import Channel, RankChannel
from twofold.config import RuntimeConfig
from twofold.contract import (
    Allocate,
    Allocated,
    Failure,
    NewRequest,
    Profile,
    Profiled,
    RankReport,
    RankStart,
    ScheduledBatch,
    Step,
)
from twofold.errors import ModelError
from twofold.kv.cache import KVCache, bytes_per_block
from twofold.models.decoder import DecoderModel
from twofold.models.loader import empty_model, fix_rope, load_model, share_weights
from twofold.parallel.exchange import Exchange
from twofold.parallel.mesh import Mesh, make_mesh
from twofold.parallel.plan import TokenLayout
from twofold.parallel.transport import make_transport
from twofold.sampling_params import SamplingParams
from twofold.worker.cuda_graphs import DECODE_ROUNDING, PREFILL_ROUNDING
from twofold.worker.device import CPU, CUDA, Device
from twofold.worker.model_runner import LaunchedStep, ModelRunner
from twofold.worker.profile import StepProfiler
from twofold.worker.request_states import RequestStates

CPU_CACHE_BYTES = 2 << 30  # a rank's cache on a CPU unless told otherwise; memory that is never written costs nothing
POLL_SECONDS = 50e-6  # between looks at the GPU and at the engine
MIN_TOKENS_TO_CAPTURE, MAX_TOKENS_TO_CAPTURE = PREFILL_ROUNDING[0][0], PREFILL_ROUNDING[-1][0]


class Rank:
    """A rank's model and memory. The engine asks for a report, has the cache allocated, then sends steps."""

    def __init__(
        self,
        runtime: RuntimeConfig,
        model: DecoderModel,
        mesh: Mesh,
        exchange: Exchange,
        backend: AttentionBackend,
        device: Device,
    ) -> None:
        self.runtime, self.model, self.mesh, self.device = runtime, model, mesh, device
        self.seconds: dict[str, float] = {}  # start-up phase -> its time
        self.num_tokens_to_capture = 0
        self._entry_widths = [spec.entry_width for spec in model.specs]
        engine = runtime.engine
        states = RequestStates(engine.max_num_seqs, runtime.max_model_len, runtime.block_size, device.torch_device)
        layout = TokenLayout(mesh.size, engine.partition_policy)
        self.runner = ModelRunner(model, states, mesh, exchange, backend, device, layout, runtime.eos_token_ids)

    def report(self) -> RankReport:
        """Measures how many blocks fit into memory; on CUDA by running the largest step that the scheduler may send."""
        runtime = self.runtime
        block_bytes = bytes_per_block(self._entry_widths, runtime.block_size, runtime.dtype)
        if self.device.torch_device.type == "cuda":
            with self.phase("compile and profile"):
                self.model.optimize(self.mesh.size, runtime.engine.enforce_eager)
                room = default = self._measure_room()
        else:
            room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // self.mesh.size
            one_request = (-(-runtime.max_model_len // runtime.block_size) + 1) * block_bytes
            default = max(CPU_CACHE_BYTES, one_request)
        return RankReport(
            rank=self.mesh.rank,
            num_blocks=(runtime.engine.kv_cache_memory_bytes or default) // block_bytes,
            max_cache_bytes=room,
            bytes_per_block=block_bytes,
            vocab_size=self.model.vocab_size,
            num_parameters=sum(parameter.numel() for parameter in self.model.body.parameters()),
            seconds=self.seconds,
        )

    def allocate(self, num_blocks: int) -> Allocated:
        """Makes the cache, and captures the CUDA graphs, which refer to its memory."""
        with self.phase("cache"):
            self._make_cache(num_blocks)
        if self.num_tokens_to_capture:
            with self.phase("graphs"):
                self.runner.capture_graphs(self.num_tokens_to_capture)
        return Allocated(self.seconds)

    def serve(self, channel: RankChannel) -> None:
        """Steps until the engine goes away (EOFError); the next is launched while one is in flight."""
        pending: LaunchedStep | None = None
        while True:
            if pending is not None and not self._wait_for_message(channel, pending):
                channel.send(self.runner.collect(pending))
                pending = None
            message = channel.recv()
            if isinstance(message, Profile):
                channel.send(self._profile(message.start))
                continue
            step: Step = message
            if pending is not None and self.runner.needs_tokens_on_cpu(step):
                channel.send(self.runner.collect(pending))
                pending = None
            launched = self.runner.launch(step)
            if pending is not None:
                channel.send(self.runner.collect(pending))
            pending = launched

    def _wait_for_message(self, channel: RankChannel, pending: LaunchedStep) -> bool:
        """Whether the next message came before the tokens of the step in flight."""
        while not channel.poll(0):
            if pending.done.query():
                return False
            channel.poll(POLL_SECONDS)
        return True

    def _profile(self, start: bool) -> Profiled:
        if start:
            self._profiler = StepProfiler()
            self._profiler.start()
            return Profiled(None)
        return Profiled(self._profiler.stop())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Notes how long a part of the start takes."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def _make_cache(self, num_blocks: int) -> None:
        runtime, device = self.runtime, self.device.torch_device
        self.runner.cache = KVCache(self._entry_widths, num_blocks, runtime.block_size, runtime.dtype, device)

    # Memory on CUDA: what the largest step and CUDA graphs leave for the cache.

    def _measure_room(self) -> int:
        """Bytes left for the cache, of the share of the GPU that the engine may use."""
        runtime = self.runtime
        self._make_cache(1)  # the null block, which these steps write to
        torch.cuda.reset_peak_memory_stats()
        self._run_largest_step()
        peak = int(torch.cuda.max_memory_allocated() * 1.05)
        # Nothing was cached before that step; expanding a long prefix takes more.
        num_tokens = -(-runtime.max_num_batched_tokens // self.mesh.size)
        latents = (spec for spec in self.model.specs if isinstance(spec, LatentSpec))
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
        shortest = min(2 * self.mesh.size, longest)
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
        size = self.mesh.size
        many = min(MAX_TOKENS_TO_CAPTURE * size, self.runtime.max_num_batched_tokens)
        launches, busy = self._seconds_of(min(64 * size, many)), self._seconds_of(many)
        wanted = 1.25 * launches / busy * many / size
        mine = torch.tensor([wanted], device=self.device.torch_device)
        everyones = mine.new_empty(size)
        self.mesh.all_gather(everyones, mine)  # graphs have collectives in them: all ranks capture the same
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
        num_graphs = len(graphs.buckets.decode) + len(graphs.buckets.prefill)
        return int(pool * 1.05) + max(0, taken - pool) * num_graphs // 2

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


def max_exchange_bytes(runtime: RuntimeConfig, specs: Sequence[AttentionSpec]) -> int:
    """Bytes of all ranks' KV entries that travel together: of the widest layer in the largest step, or of all layers
    in the largest step of decodes."""
    widths, num_ranks = [spec.entry_width for spec in specs], runtime.num_ranks
    # Each rank's part is padded to the longest, by no more than a token a request and a graph's rounding.
    padding = num_ranks * (runtime.engine.max_num_seqs + PREFILL_ROUNDING[-1][1])
    num_decodes = runtime.engine.max_num_seqs + num_ranks * DECODE_ROUNDING
    most = max((runtime.max_num_batched_tokens + padding) * max(widths), num_decodes * sum(widths))
    return most * runtime.dtype.itemsize


def make_rank(start: RankStart, folder: str, device: Device) -> Rank:
    """Makes the rank of this process. All ranks of the machine share `folder`."""
    runtime, times = start.runtime, [time.perf_counter()]
    mesh = make_mesh(start.rank, runtime.num_ranks, f"{folder}/store", device.torch_device)
    times.append(time.perf_counter())
    model = DecoderModel(_load(runtime, mesh, device.torch_device, Path(folder)))
    times.append(time.perf_counter())
    transport = make_transport(
        runtime.engine.exchange, mesh, device.torch_device, max_exchange_bytes(runtime, model.specs), folder
    )
    rank = Rank(runtime, model, mesh, Exchange(mesh, transport), make_backend(runtime.attention_backend), device)
    rank.seconds |= dict(zip(("ranks", "weights"), np.diff(times).tolist(), strict=True))
    return rank


def make_device(rank: int, runtime: RuntimeConfig) -> Device:
    if runtime.device == "cuda":
        return CUDA(rank)
    torch.set_num_threads(runtime.num_threads)
    return CPU()


def _load(runtime: RuntimeConfig, mesh: Mesh, device: torch.device, folder: Path) -> transformers.PreTrainedModel:
    config, source, model_config = runtime.engine, runtime.source, runtime.model_config
    arguments = (config, source, model_config, runtime.dtype, device, runtime.max_model_len)
    if device.type != "cpu" or mesh.size == 1:
        return load_model(*arguments)
    flag = torch.zeros(1)

    def barrier() -> None:
        mesh.all_gather(torch.zeros(mesh.size), flag)

    # On a CPU all ranks use the first one's weights.
    if mesh.rank == 0:
        model = load_model(*arguments)
    else:
        model = empty_model(model_config, runtime.dtype, device, config.trust_remote_code)
        model.requires_grad_(False)
        fix_rope(model, runtime.max_model_len)
    share_weights(model, folder, mesh.rank == 0, barrier)
    return model


def _end_with_the_engine(lifeline: int, folder: str) -> None:
    """Waits until the engine's end of the pipe closes, however the engine ended."""
    os.read(lifeline, 1)
    shutil.rmtree(folder, ignore_errors=True)  # an engine that was killed could not
    os._exit(1)


def main() -> None:
    socket_fd, lifeline, folder = sys.argv[1:]
    channel = Channel(socket.socket(fileno=int(socket_fd)))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the engine
    threading.Thread(target=_end_with_the_engine, args=(int(lifeline), folder), daemon=True).start()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with suppress(OSError):  # a home that cannot be written to
            init_hf_modules()  # a configuration of a model's own class is unpickled from there
        start: RankStart = channel.recv()
        if start.rank:  # all ranks would warn of the same: one is enough
            logging.getLogger("twofold").setLevel(logging.ERROR)
        rank = make_rank(start, folder, make_device(start.rank, start.runtime))
        channel.send(rank.report())
        allocate: Allocate = channel.recv()
        channel.send(rank.allocate(allocate.num_blocks))
        rank.serve(channel)
    except (EOFError, BrokenPipeError):
        pass  # the engine closed the channel: the rank is no longer needed
    except Exception as error:
        if not isinstance(error, ModelError):
            traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        message = lines[0] if isinstance(error, ModelError) else f"{type(error).__name__}: {lines[0]}"
        with suppress(OSError):
            channel.send(Failure(message, isinstance(error, ModelError)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # collectives may still wait for ranks that are gone


if __name__ == "__main__":
    main()
