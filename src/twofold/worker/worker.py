"""One rank: a process that loads the model, then carries out the engine's steps until the engine goes away."""

import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers

from twofold.attention.backends import make_backend
from twofold.engine.step import Step
from twofold.errors import ModelError
from twofold.executor.base import RankReport
from twofold.models.loader import DecoderModel, empty_model, fix_rope, load_model, share_weights
from twofold.parallel.exchange import AllGatherExchange
from twofold.parallel.mesh import Mesh, make_mesh
from twofold.runtime import CPU_CACHE_BYTES, RuntimeConfig
from twofold.worker.kv_cache import KVCache, bytes_per_block
from twofold.worker.messages import Failure, RankStart
from twofold.worker.model_runner import LaunchedStep, ModelRunner
from twofold.worker.request_states import RequestStates


class Worker:
    """A rank's model and memory."""

    def __init__(self, rank: int, runtime: RuntimeConfig, folder: str) -> None:
        self.runtime = runtime
        self.seconds: dict[str, float] = {}
        clock = time.perf_counter()
        self.device = torch.device(runtime.device if runtime.device == "cpu" else f"cuda:{rank}")
        if self.device.type == "cpu":
            torch.set_num_threads(runtime.num_threads)
        else:
            torch.cuda.set_device(self.device)
        self.mesh = make_mesh(rank, runtime.num_ranks, f"{folder}/store", self.device)
        self.seconds["mesh"], clock = time.perf_counter() - clock, time.perf_counter()
        self.model = DecoderModel(_load(runtime, self.mesh, self.device, Path(folder)))
        self.seconds["weights"] = time.perf_counter() - clock

    def report(self) -> RankReport:
        runtime = self.runtime
        block_bytes = bytes_per_block(self.model.specs, runtime.block_size, runtime.dtype)
        memory = runtime.engine.kv_cache_memory_bytes
        if memory is None:
            one_request = (-(-runtime.max_model_len // runtime.block_size) + 1) * block_bytes
            memory = max(CPU_CACHE_BYTES, one_request)
        return RankReport(
            rank=self.mesh.rank,
            num_blocks=memory // block_bytes,
            bytes_per_block=block_bytes,
            vocab_size=self.model.vocab_size,
            seconds=self.seconds,
        )

    def allocate(self, num_blocks: int) -> None:
        """Makes the cache, and with it the runner."""
        runtime = self.runtime
        specs, device = self.model.specs, self.device
        states = RequestStates(runtime.engine.max_num_seqs, runtime.max_model_len, runtime.block_size, device)
        self.runner = ModelRunner(
            model=self.model,
            cache=KVCache(specs, num_blocks, runtime.block_size, runtime.dtype, device),
            states=states,
            mesh=self.mesh,
            exchange=AllGatherExchange(self.mesh, device),
            backend=make_backend(runtime.attention_backend),
            policy=runtime.engine.partition_policy,
            eos_token_ids=runtime.eos_token_ids,
            device=device,
        )

    def serve(self, conn: "Connection[Any, Any]") -> None:
        """Steps until the engine closes the connection. With a step in flight the next is launched before it is read."""
        pending: LaunchedStep | None = None
        while True:
            if pending is not None and not conn.poll():
                conn.send(self.runner.collect(pending))
                pending = None
            step: Step = conn.recv()
            if pending is not None and self.runner.needs_tokens_on_cpu(step):
                conn.send(self.runner.collect(pending))
                pending = None
            launched = self.runner.launch(step)
            if pending is not None:
                conn.send(self.runner.collect(pending))
            pending = launched


def _load(
    runtime: RuntimeConfig, mesh: Mesh, device: torch.device, folder: Path
) -> transformers.PreTrainedModel:
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


def _end_with_the_engine(lifeline: int) -> None:
    """Waits until the engine's end of the pipe closes, however the engine ended."""
    os.read(lifeline, 1)
    os._exit(1)


def main() -> None:
    conn: Connection[Any, Any] = Connection(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the engine
    threading.Thread(target=_end_with_the_engine, args=(int(sys.argv[2]),), daemon=True).start()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        start: RankStart = conn.recv()
        worker = Worker(start.rank, start.runtime, start.folder)
        conn.send(worker.report())
        worker.allocate(conn.recv())
        conn.send(None)
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
