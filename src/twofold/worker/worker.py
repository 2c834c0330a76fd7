"""One rank: a process that loads the model, then carries out the engine's steps until the engine goes away."""

import logging
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from twofold.attention.backends import make_backend
from twofold.attention.mla import max_attention_bytes
from twofold.attention.spec import LatentSpec
from twofold.config import RuntimeConfig
from twofold.contract import Breakdown, Failure, NewRequest, Profile, RankReport, RankStart, ScheduledBatch, Step
from twofold.errors import ModelError
from twofold.kv.cache import KVCache, bytes_per_block
from twofold.models.loader import DecoderModel, empty_model, fix_rope, load_model, share_weights
from twofold.models.transforms.experts import use_few_token_experts
from twofold.parallel.exchange import make_exchange
from twofold.parallel.mesh import Mesh, make_mesh
from twofold.sampling_params import SamplingParams
from twofold.worker.cuda_graphs import DECODE_ROUNDING, PREFILL_ROUNDING
from twofold.worker.model_runner import LaunchedStep, ModelRunner
from twofold.worker.profile import StepProfiler
from twofold.worker.request_states import RequestStates

CPU_CACHE_BYTES = 2 << 30  # a rank's cache on a CPU unless told otherwise; memory that is never written costs nothing
POLL_SECONDS = 50e-6  # between looks at the GPU and at the engine


class Worker:
    """A rank's model and memory. The engine asks for a report, has the cache allocated, then sends steps."""

    def __init__(self, rank: int, runtime: RuntimeConfig, folder: str) -> None:
        self.runtime = runtime
        self.seconds: dict[str, float] = {}  # start-up phase -> its time
        self.device = device_of(rank, runtime.device)
        if self.device.type == "cpu":
            torch.set_num_threads(runtime.num_threads)
        else:
            torch.cuda.set_device(self.device)
        with self._phase("ranks"):
            self.mesh = make_mesh(rank, runtime.num_ranks, f"{folder}/store", self.device)
        with self._phase("weights"):
            self.model = DecoderModel(_load(runtime, self.mesh, self.device, Path(folder)))
        self._entry_widths = [spec.entry_width for spec in self.model.specs]
        self.runner = ModelRunner(
            model=self.model,
            cache=KVCache(self._entry_widths, 1, runtime.block_size, runtime.dtype, self.device),  # until `allocate`
            states=RequestStates(runtime.engine.max_num_seqs, runtime.max_model_len, runtime.block_size, self.device),
            mesh=self.mesh,
            exchange=make_exchange(runtime.engine.exchange, self.mesh, self.device, self._max_exchange_bytes(), folder),
            backend=make_backend(runtime.attention_backend),
            policy=runtime.engine.partition_policy,
            eos_token_ids=runtime.eos_token_ids,
            device=self.device,
        )

    def _max_exchange_bytes(self) -> int:
        """Rows of the largest step in the layer with the widest ones, or in all layers if they are decodes."""
        runtime, widths = self.runtime, self._entry_widths
        # Each rank's part is padded to the longest, by no more than a token a request and a graph's rounding.
        padding = runtime.num_ranks * (runtime.engine.max_num_seqs + PREFILL_ROUNDING)
        num_decodes = runtime.engine.max_num_seqs + runtime.num_ranks * DECODE_ROUNDING
        most = max((runtime.max_num_batched_tokens + padding) * max(widths), num_decodes * sum(widths))
        return most * runtime.dtype.itemsize

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def report(self) -> RankReport:
        """What there is room for. On CUDA found by running the largest step that the scheduler may send."""
        runtime = self.runtime
        block_bytes = bytes_per_block(self._entry_widths, runtime.block_size, runtime.dtype)
        num_parameters = sum(parameter.numel() for parameter in self.model.body.parameters())
        memory = runtime.engine.kv_cache_memory_bytes
        if self.device.type == "cuda":
            with self._phase("compile and profile"):
                use_few_token_experts(self.model.body)
                if not runtime.engine.enforce_eager:
                    from twofold.models.transforms.compile import compile_layers  # the compiler takes seconds to import

                    compile_layers(self.model, self.mesh.size)
                room = self._profile()
            memory = room if memory is None else min(memory, room)
        elif memory is None:
            one_request = (-(-runtime.max_model_len // runtime.block_size) + 1) * block_bytes
            memory = max(CPU_CACHE_BYTES, one_request)
        return RankReport(
            self.mesh.rank, memory // block_bytes, block_bytes, self.model.vocab_size, num_parameters, self.seconds
        )

    def _profile(self) -> int:
        """Bytes left for the cache after a step of max_num_batched_tokens, all of it written to the null block."""
        runtime = self.runtime
        longest = min(runtime.max_model_len - 1, runtime.max_num_batched_tokens)
        full, rest = divmod(runtime.max_num_batched_tokens, longest)
        lengths = ([longest] * full + [rest] * (rest > 0))[: runtime.engine.max_num_seqs]
        ids = tuple(f"profile {number}" for number in range(len(lengths)))
        new = tuple(
            NewRequest(request_id, np.zeros(length, np.int32), length, [], SamplingParams(temperature=1.0), 0)
            for request_id, length in zip(ids, lengths, strict=True)
        )
        zeros = np.zeros(len(ids), np.int64)
        batch = ScheduledBatch(ids, zeros, np.array(lengths, np.int64), np.ones(len(ids), bool))
        self.runner.collect(self.runner.launch(Step(-2, (), new, {}, batch)))
        # A decode: its kernels are made now, and the state of the requests goes with it.
        one = ScheduledBatch(ids[:1], np.array(lengths[:1], np.int64), zeros[:1] + 1, np.ones(1, bool))
        self.runner.collect(self.runner.launch(Step(-1, ids[1:], (), {}, one)))
        self.runner.states.apply(Step(0, ids[:1], (), {}, batch))
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        held_by_others = total - free - torch.cuda.memory_reserved()
        peak = int(torch.cuda.max_memory_allocated() * 1.05)
        torch.cuda.empty_cache()
        # Nothing was cached before that step; expanding a long prefix takes more.
        num_tokens = -(-runtime.max_num_batched_tokens // self.mesh.size)
        latents = (spec for spec in self.model.specs if isinstance(spec, LatentSpec))
        peak += max((max_attention_bytes(spec, num_tokens) for spec in latents), default=0)
        return max(0, int(total * runtime.engine.gpu_memory_utilization) - held_by_others - peak)

    def allocate(self, num_blocks: int) -> dict[str, float]:
        """Makes the cache, and records what refers to its place; → seconds of each start-up phase."""
        runtime, runner = self.runtime, self.runner
        with self._phase("cache"):
            runner.cache = KVCache(self._entry_widths, num_blocks, runtime.block_size, runtime.dtype, self.device)
        if self.device.type == "cuda" and not runtime.engine.enforce_eager:
            with self._phase("graphs"):
                runner.capture_graphs()
        return self.seconds

    def serve(self, conn: "Connection[Any, Any]") -> None:
        """Steps until the engine closes the connection; the next is launched while one is in flight."""
        pending: LaunchedStep | None = None
        while True:
            if pending is not None and not self._wait_for_step(conn, pending):
                conn.send(self.runner.collect(pending))
                pending = None
            message = conn.recv()
            if isinstance(message, Profile):
                conn.send(self._note_kernels(message.start))
                continue
            step: Step = message
            if pending is not None and self.runner.needs_tokens_on_cpu(step):
                conn.send(self.runner.collect(pending))
                pending = None
            launched = self.runner.launch(step)
            if pending is not None:
                conn.send(self.runner.collect(pending))
            pending = launched

    def _note_kernels(self, start: bool) -> Breakdown | None:
        if start:
            self._profiler = StepProfiler()
            self._profiler.start()
            return None
        return self._profiler.stop()

    def _wait_for_step(self, conn: "Connection[Any, Any]", pending: LaunchedStep) -> bool:
        """Whether the next step came before the tokens of the one in flight."""
        while not conn.poll(POLL_SECONDS if pending.ready is not None else 0):
            if pending.ready is None or pending.ready.query():
                return False
        return True


def device_of(rank: int, kind: str) -> torch.device:
    """Each rank has a GPU of its own."""
    return torch.device(kind if kind == "cpu" else f"cuda:{rank}")


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
    socket, lifeline, folder = sys.argv[1:]
    conn: Connection[Any, Any] = Connection(int(socket))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the engine
    threading.Thread(target=_end_with_the_engine, args=(int(lifeline), folder), daemon=True).start()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        start: RankStart = conn.recv()
        if start.rank:  # the ranks are alike: what one of them warns of is enough
            logging.getLogger("twofold").setLevel(logging.ERROR)
        worker = Worker(start.rank, start.runtime, folder)
        conn.send(worker.report())
        conn.send(worker.allocate(conn.recv()))
        worker.serve(conn)
    except EOFError:
        pass  # the engine closed the connection: it is done with us
    except Exception as error:
        if not isinstance(error, ModelError):
            traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        message = lines[0] if isinstance(error, ModelError) else f"{type(error).__name__}: {lines[0]}"
        conn.send(Failure(message, isinstance(error, ModelError)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # collectives may still wait for ranks that are gone


if __name__ == "__main__":
    main()
