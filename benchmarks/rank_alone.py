"""Time each of P ranks' part of a prompt, one after the other on one GPU: a lower bound of the time on P GPUs.

    python benchmarks/rank_alone.py --model configs/Llama-3.1-8B --ranks 4 --lens 2048,8192,32768 --output-json F

All code is a rank's own, except for the exchange: the KV entries of other ranks are random, and are already where those
ranks would push them. So no rank waits for another, and no entry is sent.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from twofold.attention.backends import make_backend
from twofold.bench.report import environment, print_table
from twofold.config import EngineConfig
from twofold.contract import Breakdown, NewRequest, ScheduledBatch, Step
from twofold.kv.cache import Write
from twofold.models.decoder import DecoderModel
from twofold.models.loader import load_model
from twofold.parallel.exchange import Exchange
from twofold.parallel.transport import OneRank, Transport, write_mine, write_others
from twofold.runtime import settle
from twofold.sampling_params import SamplingParams
from twofold.worker.device import CUDA
from twofold.worker.profile import StepProfiler
from twofold.worker.worker import Rank, max_exchange_bytes


class AloneMesh:
    """A mesh with one rank at a time."""

    rank = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def all_gather(self, gathered: torch.Tensor, mine: torch.Tensor) -> None:
        gathered.view(self.size, -1)[self.rank] = mine.flatten()

    def close(self) -> None:
        pass


class AloneTransport:
    """Writes everyone's KV entries to the cache, as after a push."""

    num_bytes, num_seconds = 0, 0.0

    def __init__(self, mesh: AloneMesh, device: torch.device, max_num_bytes: int) -> None:
        self.mesh = mesh
        self._received = torch.randn(max_num_bytes // 2, dtype=torch.bfloat16, device=device)
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._is_busy = False

    def begin(self) -> None:
        pass

    def send(self, entries: torch.Tensor, writes: Sequence[Write], ready: "torch.cuda.Event | None" = None) -> None:
        rank, size = self.mesh.rank, self.mesh.size
        self._stream.wait_stream(torch.cuda.current_stream())
        self._is_busy = True
        with torch.cuda.stream(self._stream):
            gathered = self._received[: size * entries.numel()].view(-1, entries.shape[1])
            for write in writes:
                write_mine(entries, write.slots, write.kv_slots, rank)
                write_others(gathered, write.slots, write.kv_slots, rank, size)

    def complete(self) -> None:
        if self._is_busy:
            torch.cuda.current_stream().wait_stream(self._stream)
            self._is_busy = False


class AloneRank:
    def __init__(self, args: argparse.Namespace, max_model_len: int) -> None:
        config = EngineConfig(
            model=args.model,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=max_model_len,
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=32768 * args.ranks,
        )
        runtime, _ = settle(config)
        device = CUDA(0)
        self.mesh, self.params = AloneMesh(args.ranks), SamplingParams(temperature=0, max_tokens=2)
        weights = load_model(
            config, runtime.source, runtime.model_config, runtime.dtype, device.torch_device, max_model_len
        )
        model = DecoderModel(weights)
        # Settled for the one GPU that there is; the rank is one of several.
        runtime = replace(runtime, engine=replace(config, prefill_context_parallel_size=args.ranks))
        transport: Transport = OneRank()
        if args.ranks > 1:
            max_num_bytes = max_exchange_bytes(runtime, model.specs)
            transport = AloneTransport(self.mesh, device.torch_device, max_num_bytes)
        backend = make_backend(runtime.attention_backend)
        self.rank = Rank(runtime, model, self.mesh, Exchange(self.mesh, transport), backend, device)
        self.num_blocks = self.rank.report().num_blocks
        print("start-up:", self.rank.allocate(self.num_blocks).seconds, flush=True)
        self.rng, self.num_steps, self.block_size = np.random.default_rng(0), 0, runtime.block_size

    def prefill(self, length: int) -> float:
        """Milliseconds from the step's arrival to its token on the CPU."""
        self.num_steps += 1
        ids = self.rng.integers(0, self.rank.model.vocab_size, length).astype(np.int32)
        blocks = list(range(1, 1 + -(-length // self.block_size)))
        new = NewRequest(0, 0, ids, length, blocks, self.params, 0)
        step = Step(self.num_steps, (), (new,), {}, ScheduledBatch.of([0], [length]))
        start = time.perf_counter()
        self.rank.runner.collect(self.rank.runner.launch(step))
        return (time.perf_counter() - start) * 1e3

    def profile(self, length: int) -> Breakdown:
        profiler = StepProfiler()
        profiler.start()
        self.prefill(length)
        return profiler.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--lens", default="2048,8192")
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output-json")
    args = parser.parse_args()
    lens = [int(part) for part in args.lens.split(",")]
    rank = AloneRank(args, max(lens) + 2)
    rows = []
    for length in lens:
        medians = []
        for number in range(args.ranks):
            rank.mesh.rank = number
            rank.prefill(length)
            medians.append(statistics.median(rank.prefill(length) for _ in range(args.repeats)))
        rank.mesh.rank = slowest = int(np.argmax(medians))
        parts = rank.profile(length)
        row = {
            "prompt_len": length,
            "ranks": args.ranks,
            "rank_ms": [round(median, 3) for median in medians],
            "slowest_ms": round(max(medians), 3),
            "breakdown_ms_of_slowest": {kind: round(ms, 3) for kind, ms in parts.kinds.items()}
            | {"busy": round(parts.busy, 3), "rank": slowest},
            "kernels": [(name[:90], round(ms, 3), count) for name, ms, count in parts.kernels[:16]],
        }
        rows.append(row)
        print(json.dumps({name: value for name, value in row.items() if name != "kernels"}), flush=True)
    print_table(
        ["prompt", "ranks", "slowest rank ms", "busy", "projections", "attention"],
        [
            [str(row["prompt_len"]), str(row["ranks"]), f"{row['slowest_ms']:.1f}"]
            + [f"{row['breakdown_ms_of_slowest'][name]:.1f}" for name in ("busy", "projections", "attention")]
            for row in rows
        ],
    )
    if args.output_json:
        result = environment() | {"model": args.model, "rows": rows}
        Path(args.output_json).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
