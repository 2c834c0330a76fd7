"""Time one rank of several on one GPU, alone: what its own work takes, without any exchange with other ranks.

    python benchmarks/rank_alone.py --model configs/Llama-3.1-8B -pcp 2 --lens 16,1024 --decodes 1024x1,58880x8= \
        --output-json F

All code is a rank's own, in both layouts of a step, but nothing comes from other ranks or goes to them. What they would
have pushed is in this GPU's memory already: random KV entries, zeros as their parts of sums, and flags that say that
they have come. So no rank is waited for, links take no time, and results are wrong. Not in these times: barriers and
copies of the exchange, the wait of each sum (`benchmarks/sums.py`), and the engine. With sharded weights a peer's parts
are my own, so they come faster than over a link.

Decodes are written as in `layouts.py`; steps follow each other as in an engine, with one launched ahead.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from layouts import NUM_STEPS, add_arguments, read_arguments, title
from shared_gpu import pretend

from twofold.bench.report import environment, print_table
from twofold.config import EngineConfig, RuntimeConfig
from twofold.contract import Allocate, NewRequest, RankStart, ScheduledBatch, SharedFiles, Step
from twofold.kv.cache import KVCache, Write
from twofold.parallel.mesh import Axes
from twofold.parallel.sums import GatherSum, OneRank, Sum, SymmetricSum
from twofold.parallel.transport import AllGather, write_mine, write_others
from twofold.runtime import settle
from twofold.sampling_params import SamplingParams
from twofold.worker import worker
from twofold.worker.device import CPU, CUDA
from twofold.worker.profile import StepProfiler

NUM_PROMPTS = 5
PUSH_BYTES = 1 << 20  # of x: larger sums are left out, not even added up
ALWAYS_SET = 1 << 60  # a flag: the number of a sum that has not come yet
LISTED = 28  # kernels of a profile

GREEDY = SamplingParams(temperature=0, max_tokens=1 << 20, ignore_eos=True)


class AloneMesh:
    """A rank whose peers have what it has."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def all_gather(self, gathered: torch.Tensor, mine: torch.Tensor) -> None:
        gathered.view(self.size, -1).copy_(mine.flatten().expand(self.size, -1))

    def close(self) -> None:
        pass


class AloneTransport(AllGather):
    """Everyone's KV entries go into the cache, mine from where I have made them."""

    def __init__(self, mesh: AloneMesh, device: torch.device, max_num_bytes: int, dtype: torch.dtype) -> None:
        super().__init__(mesh, device)
        self._received = torch.randn(max_num_bytes // dtype.itemsize, device=device).to(dtype)

    def _gather(self, entries: torch.Tensor, writes: Sequence[Write], ready: "torch.cuda.Event | None") -> None:
        rank, size = self.mesh.rank, self.mesh.size
        gathered = self._received[: size * entries.numel()].view(-1, entries.shape[1])
        self._wait_for(ready)
        for write in writes:
            write_mine(entries[:, write.columns], write.slots, write.kv_slots, rank)
            write_others(gathered[:, write.columns], write.slots, write.kv_slots, rank, size)


class AloneMemory:
    """Peers' memory is mine."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._size, self._device = size, device

    def allocate(self, num_bytes: int) -> list[torch.Tensor]:
        return [torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)] * self._size

    def barrier(self) -> None:
        pass


def alone_sum(mesh: AloneMesh, device: torch.device) -> Sum:
    """The kernels of `PushSum`, pushing to this GPU's own memory, where all flags are set."""
    if device.type == "cpu":
        return GatherSum(mesh)
    import triton

    from twofold.parallel import fused_sum

    class AlonePush(fused_sum.PushSum):
        def __init__(self) -> None:
            size, self.max_num_bytes = mesh.size, PUSH_BYTES
            flags_bytes = fused_sum.MAX_PROGRAMS * size * fused_sum.FLAG_BYTES
            self._memory = torch.zeros(size, flags_bytes + 2 * size * PUSH_BYTES, dtype=torch.uint8, device=device)
            self._memory[:, :flags_bytes].view(torch.long).fill_(ALWAYS_SET)
            self._buffers = torch.tensor([memory.data_ptr() for memory in self._memory], device=device)
            self._counts = torch.zeros(fused_sum.MAX_PROGRAMS, dtype=torch.long, device=device)
            self._constants = {
                "flags_bytes": flags_bytes, "part_bytes": PUSH_BYTES, "rank": mesh.rank, "size": size,
                "padded_size": triton.next_power_of_2(size), "max_programs": fused_sum.MAX_PROGRAMS,
            }  # fmt: skip

    class AloneSum(SymmetricSum):
        def __init__(self) -> None:
            self.push, self.choices = AlonePush(), ((PUSH_BYTES, "push"),)
            self._ways = {"push": self.push, "nccl": OneRank()}

    return AloneSum()


class AloneRank:
    """One rank, and the steps that an engine would send."""

    def __init__(self, arguments: dict[str, Any], number: int) -> None:
        config = EngineConfig(**arguments, skip_tokenizer_init=True)
        size = config.prefill_context_parallel_size
        with pretend(size):
            runtime, _ = settle(config)
        device = CUDA(0) if runtime.device == "cuda" else CPU()
        self.mesh, self.torch_device = AloneMesh(number, size), device.torch_device
        with patch.multiple(worker, **self._parts(runtime)), patch("twofold.models.heads.verify"):
            self.rank = worker.make_rank(RankStart(number, runtime, SharedFiles(-1, -1, -1, -1, -1)), device)
            self.report = self.rank.report()
        self._fill_buffers()
        self.allocated = self.rank.allocate(
            Allocate(self.report.num_blocks, False, self.rank.runner.by_heads is not None)
        )
        self.runner, self.block_size = self.rank.runner, runtime.block_size
        self.rng, self.num_steps = np.random.default_rng(0), 0
        self.states: list[int] = []  # taken by requests of the last run

    def _parts(self, runtime: RuntimeConfig) -> dict[str, Any]:
        """What takes the place of a rank's connections to others."""
        mesh, device = self.mesh, self.torch_device
        return {
            "make_axes": lambda *_: Axes.of_one_node(mesh),
            "make_sum": lambda *_: alone_sum(mesh, device),
            "make_transport": lambda name, axes, device, num_bytes, file: AloneTransport(
                mesh, device, num_bytes, runtime.dtype
            ),
            "make_peer_memory": lambda *_: AloneMemory(mesh.size, device),
            "verify": lambda *_: None,
        }

    @torch.inference_mode()
    def _fill_buffers(self) -> None:
        """Of sharded weights peers' parts never come: random numbers in their place."""
        if self.rank.holding is not None and self.rank.model.layers is not None:
            for layer in list(self.rank.model.layers)[:2]:
                for parameter in layer.parameters():
                    if parameter.dim() > 1:
                        parameter.data.normal_(0.0, parameter.shape[-1] ** -0.5)

    def ttft_ms(self, length: int, by_heads: bool) -> float:
        """From the step's arrival to its token on the CPU; median."""
        times = []
        for _ in range(NUM_PROMPTS + 1):
            start = time.perf_counter()
            for _ in self._run(iter([self._new(1, length, 0, by_heads, shared=False)])):
                times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times[1:])

    def decode_ms(self, name: str, by_heads: bool, profiler: StepProfiler | None = None) -> float:
        """From one step's end to the next one's, median."""
        ends = []
        for _ in self._run(self._decodes(name, by_heads)):
            ends.append(time.perf_counter())
            if profiler is not None and len(ends) == 8:
                profiler.start()
        return float(np.median(np.diff(ends)[3:-2])) * 1e3

    def _decodes(self, name: str, by_heads: bool) -> Iterator[Step]:
        context, batch = (int(part) for part in name.rstrip("=").split("x"))
        yield self._new(batch, context, context - 1, by_heads, shared=name.endswith("="))
        for number in range(1, NUM_STEPS):
            positions = [context - 1 + number] * batch
            yield Step(self._next_step(), (), (), {}, ScheduledBatch.of(positions, [1] * batch), by_heads)

    def _new(self, batch: int, length: int, computed: int, by_heads: bool, shared: bool) -> Step:
        """The first step of some requests; with `shared` all have the same tokens and blocks."""
        num_blocks = -(-(length + NUM_STEPS) // self.block_size)
        blocks = np.arange(1, 1 + num_blocks * (1 if shared else batch)).reshape(-1, num_blocks)
        ids = self.rng.integers(0, self.report.vocab_size, (len(blocks), length)).astype(np.int32)
        if computed:
            self._fill_cache(blocks.size + 1)
        new = tuple(
            NewRequest(i, i, ids[i % len(ids)], length, blocks[i % len(blocks)].tolist(), GREEDY, 0)
            for i in range(batch)
        )
        removed, self.states = tuple(self.states), list(range(batch))
        batch_of_step = ScheduledBatch.of([computed] * batch, [length - computed] * batch)
        return Step(self._next_step(), removed, new, {}, batch_of_step, by_heads)

    def _next_step(self) -> int:
        self.num_steps += 1
        return self.num_steps

    @torch.inference_mode()
    def _fill_cache(self, num_blocks: int) -> None:
        cache = self.runner.cache
        assert isinstance(cache, KVCache)
        for blocks in cache.blocks:
            blocks[1:num_blocks].normal_()

    def _run(self, steps: Iterator[Step]) -> Iterator[None]:
        """Runs steps, one launched ahead; → as each has ended."""
        pending = None
        for step in steps:
            launched = self.runner.launch(step)
            if pending is not None:
                self.runner.collect(pending)
                yield
            pending = launched
        if pending is not None:
            self.runner.collect(pending)
            yield

    def print_profile(self, name: str, by_heads: bool) -> list[tuple[str, float, float]]:
        """Milliseconds and launches of kernels in a step of decodes."""
        profiler = StepProfiler()
        self.decode_ms(name, by_heads, profiler)
        found, num_profiled = profiler.stop(), NUM_STEPS - 8
        print(f"--- {name} by {'heads' if by_heads else 'tokens'}: busy {found.busy / num_profiled:.3f} ms,", end=" ")
        print({kind: round(ms / num_profiled, 3) for kind, ms in found.kinds.items()}, flush=True)
        kernels = [(name[:110], ms / num_profiled, count / num_profiled) for name, ms, count in found.kernels[:LISTED]]
        for kernel, ms, count in kernels:
            print(f"  {ms:8.4f} ms  {count:6.1f} x  {kernel}")
        return kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, lens="16,256,1024", decodes="1024x1,1024x32")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--profile", default="", help="decodes to list kernels of, e.g. 1024x1")
    args = parser.parse_args()
    arguments, whats = read_arguments(args)
    start = time.perf_counter()
    alone = AloneRank(arguments, args.rank)
    print(f"ready after {time.perf_counter() - start:.1f} s", alone.allocated.seconds)
    print("costs of steps:", alone.allocated.step_costs, alone.report.only_by_tokens or "", flush=True)
    layouts = {"tokens": False} | ({"heads": True} if alone.runner.by_heads is not None else {})
    if arguments.get("step_layout", "auto") != "auto":
        layouts = {arguments["step_layout"]: arguments["step_layout"] == "heads"}
    rows, profiles = [], {}
    for what in whats:
        row: dict[str, Any] = {"what": title(what)}
        for layout, by_heads in layouts.items():
            ms = alone.ttft_ms(what, by_heads) if isinstance(what, int) else alone.decode_ms(what, by_heads)
            row[layout] = round(ms, 3)
        rows.append(row)
        print(row, flush=True)
    for name in [name for name in args.profile.split(",") if name]:
        for layout, by_heads in layouts.items():
            profiles[f"{name} by {layout}"] = alone.print_profile(name, by_heads)
    print_table(list(rows[0]), [[str(value) for value in row.values()] for row in rows])
    if args.output_json:
        result = environment() | {
            "rank": args.rank, "ranks": alone.mesh.size, "weight_bytes": alone.report.weight_bytes,
            "weights": alone.rank.runtime.weights, "costs": alone.allocated.step_costs, "ms": rows,
            "kernels": profiles,
        }  # fmt: skip
        Path(args.output_json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
