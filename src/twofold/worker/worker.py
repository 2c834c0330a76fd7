"""One rank: it loads the model, measures its memory, then carries out the engine's steps until the engine goes away.

A rank is given its parts: model, axes, exchange, backend and device, then a channel to the engine. `main` makes the
real ones in a process of its own.
"""

import logging
import math
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import transformers
from transformers.dynamic_module_utils import init_hf_modules

from twofold.attention.backends import make_backend
from twofold.attention.backends.base import AttentionBackend
from twofold.attention.spec import AttentionSpec, LatentSpec
from twofold.channel import Channel, RankChannel
from twofold.config import RuntimeConfig
from twofold.contract import (
    Allocate,
    Allocated,
    Failure,
    Masks,
    Profile,
    Profiled,
    RankReport,
    RankStart,
    ShardedRoom,
    SharedFiles,
    Step,
)
from twofold.errors import ModelError
from twofold.kv import sharded
from twofold.kv.cache import KVCache, bytes_per_block
from twofold.kv.sharded import LayerShare, ShardedKVCache
from twofold.machine import memory_of_process
from twofold.models.decoder import DecoderModel
from twofold.models.heads import divide, verify
from twofold.models.holding import Holding, Take
from twofold.models.loader import (
    empty_model,
    fix_rope,
    load_model,
    model_of_stand_ins,
    read_weights,
    share_weights,
)
from twofold.native.load import kernels
from twofold.parallel.exchange import Exchange
from twofold.parallel.fetch_entries import EntryFetch, workspace_bytes
from twofold.parallel.mesh import Axes, Mesh, gather, make_axes
from twofold.parallel.peer_memory import PeerMemory, make_peer_memory
from twofold.parallel.plan import TokenLayout
from twofold.parallel.shared_memory import free_bytes
from twofold.parallel.sums import Sum, make_sum
from twofold.parallel.transport import make_transport
from twofold.worker.cuda_graphs import DECODE_ROUNDING, HEADS_PREFILL, PREFILL_ROUNDING
from twofold.worker.device import CPU, CUDA, Device
from twofold.worker.model_runner import LaunchedStep, ModelRunner, fetched_layers
from twofold.worker.profile import StepProfiler
from twofold.worker.request_states import RequestStates
from twofold.worker.trial import TrialSteps

WORKSPACE_SLACK = 64  # blocks beyond those of one step: each request may leave one of its own half empty
CPU_CACHE_BYTES = 2 << 30  # a rank's cache on a CPU unless told otherwise; memory that is never written costs nothing
POLL_SECONDS = 50e-6  # between looks at the GPU and at the engine

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sharding:
    """Of a rank that keeps a part of the weights: its model comes without them."""

    read: Callable[[Take], None]  # hands over all weights, one by one
    memory: PeerMemory | None  # for their parts; None if ranks cannot read each other's


class Rank:
    """A rank's model and memory. The engine asks for a report, has the cache allocated, then sends steps."""

    def __init__(
        self,
        runtime: RuntimeConfig,
        model: DecoderModel,
        axes: Axes,
        exchange: Exchange,
        total: Sum,
        backend: AttentionBackend,
        device: Device,
        memory: PeerMemory | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        """`memory`: that ranks can read of each other, for a sharded cache; None if they cannot.

        With `sharding` the model has stand-ins for its weights (`holding.py`).
        """
        self.runtime, self.model, self.axes, self.device = runtime, model, axes, device
        self._sharding = sharding
        self.holding: Holding | None = None
        self._sum, self._memory = total, memory
        self._may_use_kernels = runtime.attention_backend == "native" and sharding is None
        self.seconds: dict[str, float] = {}  # start-up phase -> its time
        self._entry_widths = [spec.entry_width for spec in model.specs]
        engine = runtime.engine
        states = RequestStates(engine.max_num_seqs, runtime.max_model_len, runtime.block_size, device.torch_device)
        layout = TokenLayout(axes.world.size, engine.partition_policy, axes.node.size)
        self.runner = ModelRunner(model, states, axes, exchange, backend, device, layout, runtime.eos_token_ids)
        self._trial = TrialSteps(runtime, self.runner)
        self._pending: LaunchedStep | None = None  # the step in flight
        self._shares = [_share(spec, axes.gpu.size) for spec in model.specs]

    def report(self) -> RankReport:
        """Measures how many blocks fit into memory; on CUDA by running the largest step that the scheduler may send."""
        runtime = self.runtime
        block_bytes = bytes_per_block(self._entry_widths, runtime.block_size, runtime.dtype)
        is_cuda = self.device.torch_device.type == "cuda"
        if is_cuda:
            self.model.optimize(self.axes.gpu.size, runtime.engine.enforce_eager)
        only_by_tokens = self._divide() if self._sharding is None else self._shard(self._sharding)
        self._use_kernels()
        if is_cuda:
            with self.phase("compile and profile"):
                if not runtime.engine.enforce_eager:
                    for model in self.runner.models:
                        model.compile()
                self._make_cache(1)  # the null block, which trial steps write to
                room = default = self._trial.measure_room()
        else:
            room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // self.axes.gpu.size
            default = max(CPU_CACHE_BYTES, self._num_blocks_of_request() * block_bytes)
        return RankReport(
            rank=self.axes.world.rank,
            num_blocks=(runtime.engine.kv_cache_memory_bytes or default) // block_bytes,
            max_cache_bytes=room,
            bytes_per_block=block_bytes,
            vocab_size=self.model.vocab_size,
            num_parameters=sum(parameter.numel() for parameter in self.model.body.parameters()),
            sharded=self._sharded_room(room),
            weight_bytes=self._weight_bytes(),
            only_by_tokens=only_by_tokens,
            seconds=self.seconds,
        )

    def _sharded_room(self, room: int) -> ShardedRoom | None:
        """The same if this rank kept a share of the cache; `room` in bytes for all that belongs to it."""
        if self._memory is None:
            return None
        runtime, shares, by_heads = self.runtime, self._shares, self.runner.by_heads
        bytes_per_block = math.ceil(sharded.bytes_per_block(shares, runtime.block_size, runtime.dtype))
        num_tokens = max(runtime.max_model_len, runtime.max_num_batched_tokens)
        max_fetch_blocks = -(-num_tokens // runtime.block_size) + WORKSPACE_SLACK
        beside = workspace_bytes(shares, max_fetch_blocks + 1, runtime.block_size, runtime.dtype)
        if self.device.torch_device.type == "cuda":
            # Outputs of attention to each rank's heads are put together: a copy that no trial step has made.
            outputs = max(spec.num_heads * spec.v_head_dim for spec in self.model.specs) * runtime.dtype.itemsize
            beside += 2 * outputs * -(-runtime.max_num_batched_tokens // self.axes.world.size)
            default = room - beside
        else:
            # All of it is taken at once: no more than what one rank would use otherwise.
            default = max(CPU_CACHE_BYTES // self.axes.gpu.size, self._num_blocks_of_request() * bytes_per_block)
        num_bytes = max(0, runtime.engine.kv_cache_memory_bytes or default)
        return ShardedRoom(
            num_blocks=sharded.max_num_blocks(shares, num_bytes, runtime.block_size, runtime.dtype),
            max_cache_bytes=max(0, room - beside),
            bytes_per_block=bytes_per_block,
            workspace_bytes=beside,
            max_fetch_blocks=max_fetch_blocks,
            decodes_fetch_by_tokens=bool(fetched_layers(shares, self.model.specs, in_decodes=True)),
            decodes_fetch_by_heads=by_heads is None
            or bool(fetched_layers(shares, by_heads.model.specs, in_decodes=True)),
        )

    def _num_blocks_of_request(self) -> int:
        """Blocks of a request of max_model_len tokens, and some more."""
        return -(-self.runtime.max_model_len // self.runtime.block_size) + 1 + 2 * self.axes.world.size

    def _use_kernels(self) -> None:
        """Changes the model for our CPU kernels, once they are compiled: at the start, or between two steps."""
        if self._may_use_kernels and kernels:
            self._may_use_kernels = False
            with self.phase("kernels"):
                for model in self.runner.models:
                    model.optimize_for_cpu()

    def _divide(self) -> str | None:
        """Makes this rank's part of the model, for steps by heads → the reason if none runs so."""
        layout = self.runtime.engine.step_layout
        if layout == "tokens" or self.axes.world.size == 1:
            return "step_layout is tokens" if layout == "tokens" else "there is one rank"
        part, reason = self.model, None  # whole where a rank is alone on its node
        try:
            if self.axes.gpu.size > 1:
                with self.phase("heads"):
                    part = divide(self.model, self.axes.gpu, self._sum)
        except ModelError as error:
            reason = str(error)
        refusals = gather(self.axes.node, torch.tensor([float(reason is not None)], device=self.device.torch_device))
        if reason is None and bool(refusals.any()):
            reason = "it cannot be divided on another node"
        if reason is None:
            self.runner.add_heads(part)
            return None
        if layout == "heads":
            raise ModelError(f"steps cannot run by heads: {reason}; use step_layout='auto'", field="model")
        return reason

    def _shard(self, sharding: Sharding) -> str | None:
        """Keeps this rank's part of the weights → the reason if no step runs by heads."""
        with self.phase("heads"), _sharded_or_refused():
            part = divide(self.model, self.axes.gpu, self._sum)
            self.holding = Holding(self.model, part, self.axes.gpu, sharding.memory)
        with self.phase("weights"):
            self.holding.load(sharding.read, self.runtime.source.path)
        with _sharded_or_refused():
            verify(self.model, part, self.axes.gpu)  # now with the real numbers
        logger.debug(
            "weights are sharded: a rank keeps %.2f GB of %.2f, and has two buffers of %.2f GB for what it fetches",
            self._weight_bytes() / 1e9,
            (self._weight_bytes() + self.holding.fetched_bytes - self.holding.part_bytes) / 1e9,
            self.holding.buffer_bytes / 2e9,
        )
        if self.runtime.engine.step_layout == "tokens":
            return "step_layout is tokens"
        self.runner.add_heads(part)
        return None

    def _weight_bytes(self) -> int:
        """Of what this rank keeps, without what it fetches."""
        models = [self.model.model, self.model.body]
        sizes: dict[int, int] = {id(p): p.nbytes for model in models for p in model.parameters()}  # tied ones once
        saved = 0 if self.holding is None else self.holding.fetched_bytes - self.holding.part_bytes
        return sum(sizes.values()) - saved

    def allocate(self, message: Allocate) -> Allocated:
        """Makes the cache, captures the CUDA graphs, which refer to its memory, and times both layouts."""
        with self.phase("cache"):
            if message.is_sharded:
                self._make_shares(message.num_blocks)
            else:
                self._make_cache(message.num_blocks)
        if self._trial.num_tokens_to_capture:
            with self.phase("graphs"):
                self.runner.capture_graphs(self._trial.num_tokens_to_capture)
        step_costs = None
        if message.times_layouts:
            with self.phase("costs"):
                step_costs = self._trial.measure_costs().to_json()
        return Allocated(self.seconds, step_costs, memory_of_process())

    def serve(self, channel: RankChannel) -> None:
        """Steps until the engine goes away (EOFError); the next is launched while one is in flight."""
        while True:
            if self._pending is not None and not self._wait_for_message(channel, self._pending):
                self._answer(channel)
            message = channel.recv()
            if isinstance(message, Profile):
                channel.send(self._profile(message.start))
                continue
            step: Step = message
            self._use_kernels()
            if self.runner.needs_tokens_on_cpu(step):
                self._answer(channel)
            launched = self.runner.launch(step, partial(self._receive_masks, channel))
            self._answer(channel)
            self._pending = launched

    def _wait_for_message(self, channel: RankChannel, pending: LaunchedStep) -> bool:
        """Whether the next message came before the tokens of the step in flight."""
        while not channel.poll(0):
            if pending.done.query():
                return False
            channel.poll(POLL_SECONDS)
        return True

    def _answer(self, channel: RankChannel) -> None:
        """Answers the step in flight, if there is one."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            channel.send(self.runner.collect(pending))

    def _receive_masks(self, channel: RankChannel) -> Masks:
        """The masks of the step that is being launched. The engine makes them of the tokens of the step before it."""
        self._answer(channel)
        while isinstance(message := channel.recv(), Profile):
            channel.send(self._profile(message.start))
        masks: Masks = message
        return masks

    def _profile(self, start: bool) -> Profiled:
        if self.runtime.device == "cpu":  # it has no kernels to time
            return Profiled(None)
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
        self.runner.set_cache(KVCache(self._entry_widths, num_blocks, runtime.block_size, runtime.dtype, device))

    def _make_shares(self, num_blocks: int) -> None:
        runtime, memory, room = self.runtime, self._memory, self._sharded_room(0)
        assert memory is not None, "the engine knows that there is no room for shares"
        assert room is not None
        try:
            cache = ShardedKVCache(
                self._shares, num_blocks, runtime.block_size, runtime.dtype, self.axes.gpu.rank, memory.allocate
            )
        except OSError as error:
            raise ModelError(
                f"ranks cannot share memory for the KV cache: {error}; lower kv_cache_memory_bytes, or use "
                "kv_cache='replicated'"
            ) from None
        fetch = EntryFetch(cache, min(room.max_fetch_blocks + 1, num_blocks), memory)
        self.runner.set_shares(cache, fetch)


def _share(spec: AttentionSpec, num_ranks: int) -> LayerShare:
    """A layer is divided by heads where it can be."""
    by_heads = spec.num_heads % num_ranks == spec.num_kv_heads % num_ranks == 0
    by_heads = by_heads and not isinstance(spec, LatentSpec)
    return LayerShare(spec.entry_width, by_heads, num_ranks, spec.num_heads, spec.sliding_window)


@contextmanager
def _sharded_or_refused() -> Iterator[None]:
    try:
        yield
    except (ModelError, OSError) as error:
        raise ModelError(f"weights cannot be sharded: {error}; use weights='replicated'", field="weights") from None


def max_exchange_bytes(runtime: RuntimeConfig, specs: Sequence[AttentionSpec]) -> int:
    """Bytes of all ranks' KV entries that travel together: of the widest layer in the largest step, or of all layers
    in the largest step of decodes."""
    widths, num_ranks = [spec.entry_width for spec in specs], runtime.num_ranks
    # Each rank's part is padded to the longest, by no more than a token a request and a graph's rounding.
    padding = num_ranks * (runtime.engine.max_num_seqs + PREFILL_ROUNDING[-1][1])
    num_decodes = runtime.engine.max_num_seqs + num_ranks * DECODE_ROUNDING
    most = max((runtime.max_num_batched_tokens + padding) * max(widths), num_decodes * sum(widths))
    return most * runtime.dtype.itemsize


def make_rank(start: RankStart, device: Device) -> Rank:
    """Makes the rank of this process."""
    runtime, files, times = start.runtime, start.files, [time.perf_counter()]
    store = start.store or f"/proc/self/fd/{files.store}"
    axes = make_axes(start.rank, runtime.num_ranks, runtime.num_nodes, store, device.torch_device)
    times.append(time.perf_counter())
    arguments = (runtime.engine, runtime.source, runtime.model_config, runtime.dtype, device.torch_device)
    sharding = None
    if runtime.weights == "sharded":
        model = DecoderModel(model_of_stand_ins(*arguments, runtime.max_model_len))
        read = partial(read_weights, *arguments)
        sharding = Sharding(
            partial(_in_turns, axes.gpu, device.torch_device, read) if runtime.source.gguf_file else read,
            make_peer_memory(runtime.engine.exchange, axes.gpu, device.torch_device, files.weights),
        )
    else:
        model = DecoderModel(_load(runtime, axes.gpu, device.torch_device, files))
    times.append(time.perf_counter())
    max_num_bytes = max_exchange_bytes(runtime, model.specs)
    transport = make_transport(runtime.engine.exchange, axes, device.torch_device, max_num_bytes, files.entries)
    sum_bytes = HEADS_PREFILL[-1] * model.head.get_parameter("weight").shape[1] * runtime.dtype.itemsize
    total = make_sum(axes.gpu, device.torch_device, sum_bytes, files.sums)
    exchange = Exchange(axes.gpu, transport, axes.node)
    backend = make_backend(runtime.attention_backend)
    memory = None
    if runtime.num_nodes == 1:
        memory = make_peer_memory(runtime.engine.exchange, axes.gpu, device.torch_device, files.cache)
    rank = Rank(runtime, model, axes, exchange, total, backend, device, memory, sharding)
    rank.seconds |= dict(zip(("ranks", "weights"), np.diff(times).tolist(), strict=True))
    return rank


def make_device(rank: int, runtime: RuntimeConfig) -> Device:
    if runtime.device == "cuda":
        return CUDA(rank % runtime.ranks_per_node)
    torch.set_num_threads(runtime.num_threads)
    return CPU()


def _load(runtime: RuntimeConfig, mesh: Mesh, device: torch.device, files: SharedFiles) -> transformers.PreTrainedModel:
    config, source, model_config = runtime.engine, runtime.source, runtime.model_config
    arguments = (config, source, model_config, runtime.dtype, device, runtime.max_model_len)
    if device.type != "cpu" or mesh.size == 1:
        return load_model(*arguments)
    # On a CPU all ranks use the first one's weights.
    if mesh.rank == 0:
        model = load_model(*arguments)
    else:
        model = empty_model(model_config, runtime.dtype, device, config.trust_remote_code)
        model.requires_grad_(False)
        fix_rope(model, runtime.max_model_len)
    try:
        share_weights(model, mesh, files.weights)
    except OSError as error:
        if mesh.rank == 0:
            _check_room_for_all(model, mesh.size, error)
            logger.warning("each rank loads weights of its own, since ranks cannot share memory for them: %s", error)
            return model
        return load_model(*arguments)
    return model


def _in_turns(mesh: Mesh, device: torch.device, read: Callable[[Take], None], take: Take) -> None:
    """One rank reads after the other: of experts in a GGUF file Transformers makes all weights at once."""
    for rank in range(mesh.size):
        if rank == mesh.rank:
            read(take)
        mesh.all_gather(torch.zeros(mesh.size, device=device), torch.zeros(1, device=device))


def _check_room_for_all(model: transformers.PreTrainedModel, num_ranks: int, error: OSError) -> None:
    """Raises a ModelError if the other ranks have no room for weights of their own either."""
    needed = (num_ranks - 1) * sum(parameter.nbytes for parameter in model.parameters())
    if needed > (free := free_bytes()):
        raise ModelError(
            f"{num_ranks} ranks cannot share the model's weights ({error}), nor have each its own: that takes {needed} "
            f"more bytes of memory, and {free} are free; lower prefill_context_parallel_size"
        )


def main() -> None:
    """Runs a rank; the kernel ends it when the engine goes away."""
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the engine
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with suppress(OSError):  # a home that cannot be written to
            init_hf_modules()  # a configuration of a model's own class is unpickled from there
        start: RankStart = channel.recv()
        if start.rank:  # all ranks would warn of the same: one is enough
            logging.getLogger("twofold").setLevel(logging.ERROR)
        rank = make_rank(start, make_device(start.rank, start.runtime))
        channel.send(rank.report())
        allocate: Allocate = channel.recv()
        channel.send(rank.allocate(allocate))
        rank.serve(channel)
    except (EOFError, ConnectionError):
        pass  # the engine closed the channel: the rank is no longer needed
    except Exception as error:
        if not isinstance(error, ModelError):
            traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        message = lines[0] if isinstance(error, ModelError) else f"{type(error).__name__}: {lines[0]}"
        with suppress(OSError):
            channel.send(Failure(message, isinstance(error, ModelError), getattr(error, "field", None)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # collectives may still wait for ranks that are gone


if __name__ == "__main__":
    main()
