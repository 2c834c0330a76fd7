"""Times the CUDA attention kernels alone: bandwidth of decode, arithmetic of prefill, cost of a call on the CPU.

    python benchmarks/gpu_kernels.py --output-json benchmarks/results/gpu_kernels.json
    python benchmarks/gpu_kernels.py --sweep          # what `Tuning` should be

Decode calls are captured in a CUDA graph that goes round the caches of several layers, as a model does. They are more
than the L2 cache holds; blocks are dealt at random.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton

from twofold.attention.backends.flash_attn import FlashAttnBackend
from twofold.attention.backends.paged_decode import PagedDecode, Tuning
from twofold.attention.metadata import AttentionMetadata
from twofold.attention.spec import AttentionSpec
from twofold.bench.report import environment

LLAMA = AttentionSpec(num_heads=32, num_kv_heads=8, qk_head_dim=128, v_head_dim=128, scaling=128**-0.5)
LATENT = AttentionSpec(
    num_heads=16, num_kv_heads=1, qk_head_dim=576, v_head_dim=512, scaling=192**-0.5, values_in_keys=True
)
DECODE = [(1, 1024), (1, 8192), (1, 131072), (32, 1024), (32, 8192), (128, 1024)]
LATENT_DECODE = [(1, 8192), (32, 1024), (32, 8192)]
PREFILL = [(8192, 1), (32768, 1), (8192, 4), (32768, 4), (131072, 4)]  # prompt, ranks
BLOCK_SIZE = 128
CAPACITY = 131072  # tokens that a block table has room for
L2_BYTES = 50 << 20


class DecodeCase:
    """B rows of n keys in several layers' caches."""

    def __init__(self, spec: AttentionSpec, num_rows: int, seq_len: int) -> None:
        self.spec, self.num_rows, self.seq_len = spec, num_rows, seq_len
        self.bytes = num_rows * seq_len * spec.entry_width * 2
        num_blocks = -(-seq_len // BLOCK_SIZE)
        total = num_rows * num_blocks + 1
        self.layers = [
            torch.empty(total, BLOCK_SIZE, spec.entry_width, dtype=torch.bfloat16, device="cuda").normal_()
            for _ in range(min(64, max(1, -(-5 * L2_BYTES // self.bytes))))
        ]
        self.tables = torch.zeros(num_rows, CAPACITY // BLOCK_SIZE, dtype=torch.int32, device="cuda")
        self.tables[:, :num_blocks] = (torch.randperm(total - 1, device="cuda") + 1).view(num_rows, num_blocks)
        self.seq_lens = torch.full((num_rows,), seq_len, dtype=torch.int32, device="cuda")
        shape = (num_rows, spec.num_heads, spec.qk_head_dim)
        self.query = torch.randn(shape, device="cuda").bfloat16()

    def time(self, decode: PagedDecode, repeats: int) -> float:
        """Median microseconds of one call."""
        calls = max(4, len(self.layers))

        def run() -> None:
            for call in range(calls):
                decode(self.query, self.layers[call % len(self.layers)], self.spec, self.tables, self.seq_lens)

        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return median_us(graph.replay, repeats) / calls


def median_us(run: Callable[[], object], repeats: int, warmup: int = 2) -> float:
    """Of the device's time for `run`, in microseconds."""
    for _ in range(warmup):
        run()
    events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    times: list[float] = [start.elapsed_time(end) for start, end in itertools.pairwise(events)]
    return statistics.median(times) * 1e3


def time_decode(repeats: int) -> list[dict[str, Any]]:
    rows = []
    for name, spec, shapes in (("decode", LLAMA, DECODE), ("latent decode", LATENT, LATENT_DECODE)):
        for num_rows, seq_len in shapes:
            case = DecodeCase(spec, num_rows, seq_len)
            us = case.time(PagedDecode(), repeats)
            rows.append(
                {"kernel": name, "batch": num_rows, "context": seq_len, "us": us, "gb_per_s": case.bytes / us / 1e3}
            )
            print(f"{name:14} {num_rows:4} x {seq_len:6}  {us:9.1f} us  {rows[-1]['gb_per_s']:7.0f} GB/s", flush=True)
    return rows


def rank0_step(prompt_len: int, num_ranks: int) -> tuple[AttentionMetadata, float]:
    """Head and tail of a prompt on rank 0, and the multiply-adds of their attention times two, over all heads."""
    length = prompt_len // (2 * num_ranks)
    parts = [(0, length), (prompt_len - length, length)] if num_ranks > 1 else [(0, prompt_len)]
    seq_lens = np.array([start + count for start, count in parts])
    query_start = np.concatenate([[0], np.cumsum([count for _, count in parts])])
    deal = np.random.default_rng(0).permutation(prompt_len // BLOCK_SIZE) + 1
    tables = np.tile(deal, (len(parts), 1)).astype(np.int32)
    pairs = sum(count * start + count * (count + 1) / 2 for start, count in parts)
    metadata = AttentionMetadata(
        num_tokens=int(query_start[-1]),
        query_start_np=query_start,
        seq_lens_np=seq_lens,
        block_tables_np=tables,
        query_start=torch.from_numpy(query_start.astype(np.int32)).cuda(),
        seq_lens=torch.from_numpy(seq_lens.astype(np.int32)).cuda(),
        block_tables=torch.from_numpy(tables).cuda(),
        max_query_len=max(count for _, count in parts),
        max_seq_len=prompt_len,
        num_row_blocks=int((-(-seq_lens // BLOCK_SIZE)).sum()),
        num_decode_rows=0,
    )
    return metadata, 4 * LLAMA.num_heads * LLAMA.qk_head_dim * pairs


def time_prefill(repeats: int) -> list[dict[str, Any]]:
    backend, rows = FlashAttnBackend(), []
    for prompt_len, num_ranks in PREFILL:
        metadata, flops = rank0_step(prompt_len, num_ranks)
        kv_cache = torch.empty(
            prompt_len // BLOCK_SIZE + 1, BLOCK_SIZE, LLAMA.entry_width, dtype=torch.bfloat16, device="cuda"
        ).normal_()
        query = torch.randn(metadata.num_tokens, LLAMA.num_heads, LLAMA.qk_head_dim, device="cuda").bfloat16()

        def run(
            query: torch.Tensor = query, kv_cache: torch.Tensor = kv_cache, metadata: AttentionMetadata = metadata
        ) -> object:
            return backend.attend(query, kv_cache, LLAMA, metadata)

        us = median_us(run, repeats)
        rows.append(
            {"kernel": "prefill", "prompt": prompt_len, "ranks": num_ranks, "us": us, "tflop_per_s": flops / us / 1e6}
        )
        print(
            f"prefill {prompt_len:6} tokens, 1 of {num_ranks} ranks  {us:9.1f} us  {flops / us / 1e6:6.0f} TFLOP/s",
            flush=True,
        )
    return rows


def time_host(calls: int = 200) -> list[dict[str, Any]]:
    """What a call costs the CPU: it bounds short steps that no graph holds."""
    backend, rows = FlashAttnBackend(), []
    metadata, _ = rank0_step(1024, 4)
    kv_cache = torch.zeros(9, BLOCK_SIZE, LLAMA.entry_width, dtype=torch.bfloat16, device="cuda")
    query = torch.randn(256, LLAMA.num_heads, LLAMA.qk_head_dim, device="cuda").bfloat16()
    decode, tables = PagedDecode(), metadata.block_tables[:1]
    runs: dict[str, Callable[[], object]] = {
        "prefill call": lambda: backend.attend(query, kv_cache, LLAMA, metadata),
        "decode call": lambda: decode(query[:1], kv_cache, LLAMA, tables, metadata.seq_lens[:1]),
    }
    for name, run in runs.items():
        run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        us = (time.perf_counter() - start) / calls * 1e6
        torch.cuda.synchronize()
        rows.append({"kernel": name, "host_us": us})
        print(f"{name}: {us:.0f} us of the CPU", flush=True)
    return rows


def sweep(repeats: int) -> list[dict[str, Any]]:
    """First the shape of a program, then how many programs and how short a run."""
    shapes = [(1, 1024), (1, 131072), (32, 1024), (32, 8192), (128, 1024)]
    cases = [DecodeCase(LLAMA, num_rows, seq_len) for num_rows, seq_len in shapes]
    shapes += [(1, 1024), (32, 1024)]
    cases += [DecodeCase(LATENT, num_rows, seq_len) for num_rows, seq_len in shapes[-2:]]
    rows: list[dict[str, Any]] = []
    print(f"{'us a call; latents last':44}", *(f"{f'{b}x{n}':>10}" for b, n in shapes))

    def measure(tuning: Tuning) -> float:
        """The mean slow-down over what all of the bandwidth would take, 4.8 TB/s."""
        try:
            times = [case.time(PagedDecode(tuning), repeats) for case in cases]
        except triton.runtime.errors.OutOfResources as error:
            print(f"{_describe(tuning):44} {error}")
            return float("inf")
        rows.append({"tuning": _describe(tuning), "shapes": shapes, "us": times})
        print(f"{_describe(tuning):44}", *(f"{us:10.1f}" for us in times), flush=True)
        return statistics.geometric_mean(us / (case.bytes / 4.8e6) for us, case in zip(times, cases, strict=True))

    programs = [
        Tuning(block_n=block_n, num_warps=num_warps, num_stages=num_stages)
        for block_n, num_warps, num_stages in itertools.product((32, 64, 128), (4, 8), (2, 3, 4))
        if (block_n, num_warps) != (32, 8)
    ]
    best = min(programs, key=measure)
    splits = [
        Tuning(best.block_n, best.num_warps, best.num_stages, programs=count, min_run=min_run, long_run=long_run)
        for count, min_run, long_run in itertools.product((256, 512, 768, 1024), (64, 128), (64, 1024, 2048))
    ]
    best = min(splits, key=measure)
    print("best:", _describe(best))
    return rows


def _describe(tuning: Tuning) -> str:
    return (
        f"block_n={tuning.block_n} warps={tuning.num_warps} stages={tuning.num_stages} "
        f"programs={tuning.programs} min_run={tuning.min_run} long_run={tuning.long_run}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="try the constants of the decode kernels")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output-json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this needs a GPU")
    torch.manual_seed(0)
    if args.sweep:
        rows = sweep(args.repeats)
    else:
        rows = time_decode(args.repeats) + time_prefill(args.repeats) + time_host()
    if args.output_json:
        args.output_json.write_text(json.dumps(environment() | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
