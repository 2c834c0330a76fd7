"""Time sums over ranks: every way there is, at the sizes of a model's steps, on all GPUs or on two CPU ranks.

    python benchmarks/sums.py [--ranks 2] [--output-json FILE]

On GPUs x is [b, 4096] bfloat16; calls are launched one by one, then 64 of them are replayed from a CUDA graph. On CPUs
each rank has one thread. A figure is the median over repeats of the slowest rank's mean.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from twofold.bench.report import environment, print_table
from twofold.parallel.mesh import ProcessMesh
from twofold.parallel.sums import GatherSum, SharedMemorySum, Sum, summing

CPU_SHAPES = [(1, 576), (32, 576), (1, 1024), (32, 1024)]
NUM_CALLS = 64  # of a repeat, about those of a step


class AllReduce:
    """What PyTorch offers."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total


def run_cpu(mesh: ProcessMesh, folder: str, repeats: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    file = os.open(f"{folder}/sums", os.O_RDWR | os.O_CREAT)
    ways: dict[str, Sum] = {
        "all_reduce": AllReduce(), "gather": GatherSum(mesh), "shared_memory": SharedMemorySum(mesh, 1 << 20, file),
    }  # fmt: skip
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in CPU_SHAPES:
            x = torch.randn(shape, dtype=dtype)
            for name, way in ways.items():
                with summing(way):
                    us = median_us(mesh, lambda: time_calls(x), repeats)
                rows.append({"way": name, "dtype": str(dtype), "shape": shape, "us": round(us, 1)})
    return rows


def time_calls(x: torch.Tensor) -> float:
    """Mean microseconds of a call."""
    start = time.perf_counter()
    for _ in range(NUM_CALLS):
        torch.ops.twofold.sum_over_ranks(x)
    return (time.perf_counter() - start) / NUM_CALLS * 1e6


def median_us(mesh: ProcessMesh, run: Callable[[], float], repeats: int) -> float:
    """Of the slowest rank."""
    times = torch.tensor([run() for _ in range(repeats + 2)][2:])
    everyone = times.new_empty(mesh.size * repeats)
    mesh.all_gather(everyone, times)
    return statistics.median(everyone.view(mesh.size, repeats).amax(0).tolist())


def run_rank(rank: int, size: int, folder: str, repeats: int) -> None:
    mesh = ProcessMesh(rank, size, f"{folder}/store", torch.device("cpu"))
    rows = run_cpu(mesh, folder, repeats)
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    mesh.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--output-json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (args.ranks, folder, args.repeats), nprocs=args.ranks)
        rows = json.loads(Path(folder, "rows.json").read_text())
    header = list(rows[0])
    print_table(header, [[str(row[name]) for name in header] for row in rows])
    if args.output_json:
        args.output_json.write_text(json.dumps(environment() | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
