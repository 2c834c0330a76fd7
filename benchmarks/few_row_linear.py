"""Time products of few rows: the library's against configurations of our kernel (`few_row_linear.py`), on one GPU.

    python benchmarks/few_row_linear.py [--output-json FILE]

Shapes are those of Llama-3.1-8B, by heads on two ranks and by tokens (whole), and DeepSeek-V2-Lite's latents. 32 calls
are replayed from a CUDA graph; they go round weights that the L2 cache does not hold. A line shows the library, what
`TUNINGS` chooses, and the best of all configurations. The table at the end shows how much longer than the best one a
configuration takes, on average over shapes: this is what `TUNINGS` is filled in from.
"""

import argparse
import itertools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton

from twofold.bench.report import environment
from twofold.models.transforms.few_row_kernels import launch
from twofold.models.transforms.few_row_linear import Tuning, choose

NUM_ROWS = (1, 2, 4, 8, 16, 32)
# name: the whole width of its rows, and of each weight outputs and inputs
SHAPES: dict[str, tuple[int, list[tuple[int, int]]]] = {
    "q": (4096, [(2048, 4096)]),
    "kv": (4096, [(1024, 4096)]),
    "q, kv": (4096, [(2048, 4096), (1024, 4096)]),
    "o": (4096, [(4096, 2048)]),
    "gate_up": (4096, [(14336, 4096)]),
    "down": (14336, [(4096, 7168)]),
    "head": (4096, [(64128, 4096)]),
    "latents": (2048, [(576, 2048)]),
    "whole q": (4096, [(4096, 4096)]),
    "whole kv": (4096, [(2048, 4096)]),
    "whole gate_up": (4096, [(28672, 4096)]),
    "whole down": (14336, [(4096, 14336)]),
}
BY_ADDING = [
    Tuning(4, 1024, 4), Tuning(2, 1024, 4), Tuning(1, 1024, 4), Tuning(4, 512, 2), Tuning(2, 2048, 8),
    Tuning(2, 4096, 8), Tuning(1, 4096, 8), Tuning(1, 4096, 4),
    Tuning(8, 1024, 4, 4), Tuning(4, 1024, 4, 4), Tuning(2, 1024, 4, 6),
]  # fmt: skip
BY_DOT = [
    Tuning(16, 256, 2, 6, True), Tuning(16, 256, 4, 5, True), Tuning(16, 512, 4, 4, True), Tuning(32, 128, 4, 6, True),
    Tuning(32, 256, 4, 4, True), Tuning(64, 64, 4, 8, True), Tuning(64, 128, 4, 5, True),
]  # fmt: skip
MAX_SUMS = 64  # that a thread keeps in registers
NUM_CALLS, NUM_REPLAYS = 32, 5
CACHE_BYTES = 50 << 20

Call = Callable[[torch.Tensor, list[torch.Tensor]], list[torch.Tensor]]


def library(x: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    return [F.linear(x, weight) for weight in weights]


def configurations(num_rows: int) -> list[Tuning]:
    def num_sums(tuning: Tuning) -> int:
        return triton.next_power_of_2(num_rows) * tuning.block_n * tuning.block_k // (32 * tuning.num_warps)

    return [tuning for tuning in BY_ADDING if num_sums(tuning) <= MAX_SUMS] + BY_DOT


def make_weights(width: int, shapes: list[tuple[int, int]]) -> list[list[torch.Tensor]]:
    """So many that reading them all empties the cache several times. Narrow ones are columns of wider ones."""
    num_bytes = sum(2 * math.prod(shape) for shape in shapes)
    count = max(2, min(NUM_CALLS, 8 * CACHE_BYTES // num_bytes))
    return [
        [
            torch.empty(out, width, dtype=torch.bfloat16, device="cuda").normal_(std=inputs**-0.5)[:, -inputs:]
            for out, inputs in shapes
        ]
        for _ in range(count)
    ]


def time_us(call: Call, x: torch.Tensor, copies: list[list[torch.Tensor]]) -> float:
    """Median microseconds of a call."""
    call(x, copies[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(NUM_CALLS):
            call(x, copies[number % len(copies)])
    graph.replay()
    events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(NUM_REPLAYS + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in itertools.pairwise(events)]
    return statistics.median(times) / NUM_CALLS * 1e3


def check(call: Call, x: torch.Tensor, weights: list[torch.Tensor]) -> None:
    found = call(x, weights)
    for ours, theirs, again in zip(found, library(x, weights), call(x, weights), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)
        assert torch.equal(ours, again), "results differ from call to call"


def name(tuning: Tuning) -> str:
    return (
        "x".join(map(str, astuple(tuning)[:2])) + f" w{tuning.num_warps} s{tuning.num_stages}" + " dot" * tuning.by_dot
    )


def time_shape(shape: str, num_rows: int, copies: list[list[torch.Tensor]]) -> dict[str, Any]:
    inputs, outputs = copies[0][0].shape[1], sum(len(weight) for weight in copies[0])
    x = torch.randn(num_rows, inputs, device="cuda").bfloat16()
    chosen = choose(num_rows, outputs)
    us: dict[str, float] = {}
    for tuning in dict.fromkeys([*configurations(num_rows), *([chosen] if chosen else [])]):
        call: Call = lambda x, weights, tuning=tuning: launch(x, weights, tuning)  # type: ignore[misc]  # noqa: E731
        try:
            check(call, x, copies[0])
            us[name(tuning)] = time_us(call, x, copies)
        except Exception as error:  # the others are still worth knowing
            print(f"{shape}, {num_rows} rows, {name(tuning)}: {str(error).strip().splitlines()[0]}", flush=True)
    return {
        "shape": shape, "rows": num_rows, "bytes": 2 * inputs * outputs,
        "chosen": name(chosen) if chosen else "library", "library_us": time_us(library, x, copies), "us": us,
    }  # fmt: skip


def print_line(row: dict[str, Any]) -> None:
    def told(us: float) -> str:
        return f"{us:7.2f} us {row['bytes'] / us / 1e6:5.2f} TB/s"

    us = row["us"]
    line = f"{row['shape']:14}{row['rows']:3} rows | library {told(row['library_us'])}"
    line += f" | chosen {told(us.get(row['chosen'], math.nan))}"
    if us:
        best = min(us, key=lambda config: us[config])
        line += f" | best {told(us[best])}  {best}"
    print(line, flush=True)


def print_ranking(rows: list[dict[str, Any]]) -> None:
    for num_rows in NUM_ROWS:
        longer: dict[str, list[float]] = defaultdict(list)
        same = [row for row in rows if row["rows"] == num_rows]
        for row in same:
            for config, us in row["us"].items():
                longer[config].append(us / min(row["us"].values()) - 1)
        complete = {config: statistics.mean(values) for config, values in longer.items() if len(values) == len(same)}
        ranking = sorted(complete, key=lambda config: complete[config])
        print(f"{num_rows:3} rows: " + ", ".join(f"{config} +{complete[config]:.1%}" for config in ranking[:8]))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for shape, (width, sizes) in SHAPES.items():
        copies = make_weights(width, sizes)
        for num_rows in NUM_ROWS:
            rows.append(time_shape(shape, num_rows, copies))
            print_line(rows[-1])
    print_ranking(rows)
    if args.output_json:
        args.output_json.write_text(json.dumps(environment() | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
