"""Time sums over ranks: every way there is, at the sizes of a model's steps, on all GPUs or on two CPU ranks.

    python benchmarks/sums.py [--output-json FILE]

On GPUs x is [b, 4096] bfloat16; calls are launched one by one, and 64 of them are replayed from a CUDA graph. What
follows a sum in a model, the residual with or without the norm, is timed as one more kernel, and fused with our own
sum. On CPUs each rank has one thread. A figure is the slowest rank's microseconds of a call, the median of repeats.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from twofold.bench.report import environment, print_table
from twofold.parallel.mesh import ProcessMesh
from twofold.parallel.shared_memory import Rendezvous
from twofold.parallel.sums import AllReduce, GatherSum, SharedMemorySum, Sum, SymmetricSum, summing, time_in_graph

CPU_SHAPES = [(1, 576), (32, 576), (1, 1024), (32, 1024)]
BATCHES, WIDTH = [1, 8, 32, 128, 512, 2048], 4096
NUM_CALLS = 64  # about those of a step
EPSILON = 1e-5


def run_cpu(mesh: ProcessMesh, folder: str, repeats: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    file = os.open(f"{folder}/sums", os.O_RDWR | os.O_CREAT)
    ways: dict[str, Sum] = {
        "all_reduce": AllReduce(mesh),
        "gather": GatherSum(mesh),
        "shared_memory": SharedMemorySum(mesh, Rendezvous(mesh, 1 << 20, file)),
    }
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in CPU_SHAPES:
            x = torch.randn(shape, dtype=dtype)
            for name, way in ways.items():
                with summing(way):
                    times = slowest(mesh, partial(time_launches, torch.ops.twofold.sum_over_ranks, x), repeats)
                us, best_us = median(times), round(min(times), 2)
                rows.append({"way": name, "dtype": str(dtype), "shape": shape, "us": us, "best_us": best_us})
    return rows


def run_gpu(mesh: ProcessMesh, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    from twofold.parallel.fused_sum import PushSum

    measured = SymmetricSum(mesh, device, BATCHES[-1] * WIDTH * 2)
    if mesh.rank == 0:
        print("measured at start-up:", measured.choices, flush=True)
    push = PushSum(mesh, device, 1 << 20)
    weight = torch.rand(WIDTH, device=device).bfloat16()
    add_norm = torch.compile(add_then_norm)
    rows = []
    for batch in BATCHES:
        x, residual = (torch.randn(batch, WIDTH, device=device).bfloat16() for _ in range(2))
        calls: dict[str, Callable[[torch.Tensor], object]] = {}
        for name in ("push", "one_shot", "two_shot", "nccl"):
            if name != "push" or push.fits(x):
                calls[name] = one_way(measured, name)
                calls[f"{name}, norm"] = norm_after(calls[name], add_norm, residual, weight)
        if push.fits(x):
            calls["push, add"] = lambda x, residual=residual: residual + push(x)
            calls["fused add"] = partial(push, residual=residual)
        if push.fits_rows(x):
            calls["fused norm"] = partial(push.add_norm, residual=residual, weight=weight, epsilon=EPSILON)
        for name, call in calls.items():
            launched = slowest(mesh, partial(time_launches, call, x), repeats)
            replayed = slowest(mesh, partial(time_in_graph, call, x, NUM_CALLS), 1)
            rows.append({"way": name, "batch": batch, "launched_us": median(launched), "graph_us": median(replayed)})
            if mesh.rank == 0:
                print(rows[-1], flush=True)
    return rows


def one_way(measured: SymmetricSum, name: str) -> Sum:
    """A sum that always goes that way, in the buffers of `measured`."""

    def call(x: torch.Tensor) -> torch.Tensor:
        measured.choices = ((x.nbytes, name),)
        return measured(x)

    return call


def add_then_norm(
    total: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    added = residual + total
    wide = added.float()
    return added, weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)).to(added.dtype)


def norm_after(
    way: Callable[[torch.Tensor], Any], add_norm: Callable[..., Any], residual: torch.Tensor, weight: torch.Tensor
) -> Callable[[torch.Tensor], object]:
    return lambda x: add_norm(way(x), residual, weight)


def time_launches(call: Callable[[torch.Tensor], object], x: torch.Tensor) -> float:
    """Mean microseconds of calls one after the other."""
    synchronize(x)
    start = time.perf_counter()
    for _ in range(NUM_CALLS):
        call(x)
    synchronize(x)
    return (time.perf_counter() - start) / NUM_CALLS * 1e6


def synchronize(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def slowest(mesh: ProcessMesh, run: Callable[[], float], repeats: int) -> list[float]:
    """Each repeat's time on the slowest rank; two more repeats warm up."""
    device = "cpu" if dist.get_backend() == "gloo" else "cuda"
    times = torch.tensor([run() for _ in range(repeats + 2)][2:], device=device)
    everyone = times.new_empty(mesh.size * repeats)
    mesh.all_gather(everyone, times)
    return everyone.view(mesh.size, repeats).amax(0).tolist()


def median(times: list[float]) -> float:
    return round(statistics.median(times), 2)


def run_rank(rank: int, size: int, folder: str, repeats: int) -> None:
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device(f"cuda:{rank}")
        torch.cuda.set_device(device)
    mesh = ProcessMesh.join(rank, size, f"{folder}/store", device)
    with torch.inference_mode():
        rows = run_cpu(mesh, folder, repeats) if device.type == "cpu" else run_gpu(mesh, device, repeats)
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    mesh.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--output-json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (args.ranks, folder, args.repeats), nprocs=args.ranks)
        rows = json.loads(Path(folder, "rows.json").read_text())
    print_table(list(rows[0]), [[str(value) for value in row.values()] for row in rows])
    if args.output_json:
        args.output_json.write_text(json.dumps(environment() | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
