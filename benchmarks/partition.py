"""Measure how long it takes to partition a step of 256 requests over 8 ranks; it must take less than one millisecond.

python benchmarks/partition.py [--requests 256] [--ranks 8] [--output-json FILE]
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

from twofold.bench.report import environment
from twofold.contract import ScheduledBatch
from twofold.parallel.plan import TokenLayout, plan_step


def mixed_batch(num_requests: int, num_prefills: int) -> ScheduledBatch:
    """Decodes at contexts of all lengths, mixed with `num_prefills` chunks of prompts."""
    rng = np.random.default_rng(0)
    scheduled = np.ones(num_requests, np.int64)
    scheduled[rng.choice(num_requests, num_prefills, replace=False)] = rng.integers(100, 8192, num_prefills)
    return ScheduledBatch.of(rng.integers(0, 131072, num_requests), scheduled)


def microseconds(batch: ScheduledBatch, num_ranks: int, num_runs: int = 2000) -> dict[str, float]:
    times, layout = np.empty(num_runs), TokenLayout(num_ranks)
    for run in range(num_runs):
        start = time.perf_counter()
        plan_step(batch, layout)
        times[run] = time.perf_counter() - start
    return {"median": float(np.median(times) * 1e6), "p99": float(np.percentile(times, 99) * 1e6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--output-json")
    args = parser.parse_args()
    results = {}
    for name, num_prefills in (("decodes", 0), ("mixed", args.requests // 8), ("prefills", args.requests)):
        results[name] = microseconds(mixed_batch(args.requests, num_prefills), args.ranks)
        print(f"{name:9s} median {results[name]['median']:6.0f} µs   p99 {results[name]['p99']:6.0f} µs")
    if args.output_json:
        record = environment() | {"requests": args.requests, "ranks": args.ranks, "microseconds": results}
        Path(args.output_json).write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(0 if results["mixed"]["median"] < 1000 else 1)


if __name__ == "__main__":
    main()
