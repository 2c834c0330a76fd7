"""What each of P ranks computes of a prompt, one after the other on one GPU: what P GPUs cannot be faster than.

    python benchmarks/rank_alone.py --model configs/Llama-3.1-8B --ranks 4 --lens 2048,8192,32768 --output-json F

Everything is a rank's own code but the exchange: the rows of the others, which nobody computed, are random and lie
where they would have been pushed to. So no rank waits for another, and no row crosses a link.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from twofold.bench.report import environment, print_table
from twofold.config import EngineConfig
from twofold.contract import Breakdown, NewRequest, ScheduledBatch, Step
from twofold.kv.cache import write_entries
from twofold.parallel.exchange import AllGatherExchange
from twofold.runtime import settle
from twofold.sampling_params import SamplingParams
from twofold.worker import worker
from twofold.worker.profile import StepProfiler


class AloneMesh:
    """A mesh of which one rank is there at a time."""

    rank = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def all_gather(self, gathered: torch.Tensor, mine: torch.Tensor) -> None:
        gathered.view(self.size, -1)[self.rank] = mine.flatten()

    def close(self) -> None:
        pass


class AloneExchange(AllGatherExchange):
    """Writes everyone's rows to the cache, as after a push."""

    def __init__(self, mesh: AloneMesh, device: torch.device, max_num_bytes: int) -> None:
        super().__init__(mesh, device)
        self._received = torch.randn(max_num_bytes // 2, dtype=torch.bfloat16, device=device)

    def _gather(self, rows: torch.Tensor, slots: torch.Tensor, cache: torch.Tensor) -> None:
        begin, end = self.mesh.rank * len(rows), (self.mesh.rank + 1) * len(rows)
        gathered = self._received[: self.mesh.size * rows.numel()].view(-1, rows.shape[1])
        write_entries(rows, slots[begin:end], cache)
        for part in (slice(begin), slice(end, len(gathered))):
            if len(gathered[part]):
                write_entries(gathered[part], slots[part], cache)


class Rank:
    def __init__(self, args: argparse.Namespace, max_model_len: int) -> None:
        config = EngineConfig(
            model=args.model,
            prefill_context_parallel_size=args.ranks,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=max_model_len,
            max_num_seqs=args.max_num_seqs,
        )
        with patch("torch.cuda.device_count", return_value=args.ranks):
            runtime, _ = settle(config)
        self.mesh, self.params = AloneMesh(args.ranks), SamplingParams(temperature=0, max_tokens=2)
        worker.make_mesh = lambda *_: self.mesh  # type: ignore[assignment]
        if args.ranks > 1:
            worker.make_exchange = lambda name, mesh, *rest: AloneExchange(mesh, *rest[:2])  # type: ignore[arg-type]
        worker.device_of = lambda rank, kind: torch.device("cuda:0")
        with tempfile.TemporaryDirectory() as folder:
            self.worker = worker.Worker(0, runtime, folder)
            self.num_blocks = self.worker.report().num_blocks
            print("start-up:", self.worker.allocate(self.num_blocks), flush=True)
        self.rng, self.num_steps, self.block_size = np.random.default_rng(0), 0, runtime.block_size

    def prefill(self, length: int) -> float:
        """Milliseconds from the step's arrival to its token on the CPU."""
        self.num_steps += 1
        name, before = f"{self.num_steps}", (f"{self.num_steps - 1}",) if self.num_steps > 1 else ()
        ids = self.rng.integers(0, self.worker.model.vocab_size, length).astype(np.int32)
        blocks = list(range(1, 1 + -(-length // self.block_size)))
        new = NewRequest(name, ids, length, blocks, self.params, 0)
        batch = ScheduledBatch((name,), np.zeros(1, np.int64), np.array([length]), np.ones(1, bool))
        step = Step(self.num_steps, before, (new,), {}, batch)
        start = time.perf_counter()
        self.worker.runner.collect(self.worker.runner.launch(step))
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
    rank = Rank(args, max(lens) + 2)
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
