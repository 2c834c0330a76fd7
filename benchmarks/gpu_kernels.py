"""Times the CUDA attention kernels alone: bandwidth of decode, arithmetic of prefill, cost of a call on the CPU.

    python benchmarks/gpu_kernels.py --output-json benchmarks/results/gpu_kernels.json
    python benchmarks/gpu_kernels.py --sweep          # what `Tuning` should be
    python benchmarks/gpu_kernels.py --shared-prefix  # what `shared_prefix.MIN_SAVED_TOKENS` should be

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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton

from twofold.attention import shared_prefix
from twofold.attention.backends.flash_attn import FlashAttnBackend
from twofold.attention.backends.paged_decode import HEADS, LATENTS, PagedDecode, Tuning
from twofold.attention.metadata import AttentionMetadata
from twofold.attention.spec import AttentionSpec
from twofold.bench.report import environment
from twofold.contract import ScheduledBatch
from twofold.parallel.plan import TokenLayout, plan_step
from twofold.worker.input_batch import find_shared_prefix

LLAMA = AttentionSpec(num_heads=32, num_kv_heads=8, qk_head_dim=128, v_head_dim=128, scaling=128**-0.5)
HALF_LLAMA = replace(LLAMA, num_heads=16, num_kv_heads=4)  # one of two ranks in a step by heads
LATENT = AttentionSpec(
    num_heads=16, num_kv_heads=1, qk_head_dim=576, v_head_dim=512, scaling=192**-0.5, values_in_keys=True
)
DECODE = [(1, 1024), (1, 8192), (1, 131072), (32, 1024), (32, 8192), (128, 1024)]
LATENT_DECODE = [(1, 8192), (32, 1024), (32, 8192)]
# rows, tokens that they share, tokens of each row's own
SHARED_PREFIX = [(8, 58880, 1000), *itertools.product((2, 8, 32), (1024, 2048, 4096, 8192, 16384, 65536), (300,))]
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
        return graph_us(
            lambda layer: decode(self.query, layer, self.spec, self.tables, self.seq_lens), self.layers, repeats
        )


def graph_us(attend: Callable[[torch.Tensor], object], layers: list[torch.Tensor], repeats: int) -> float:
    """Median microseconds of one call in a CUDA graph that goes round the layers' caches."""
    calls = max(4, len(layers))

    def run() -> None:
        for call in range(calls):
            attend(layers[call % len(layers)])

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


def sharing_rows(num_rows: int, prefix_len: int, own_len: int) -> AttentionMetadata:
    """Decodes that share the first `prefix_len` tokens, which the metadata says. Blocks are dealt at random."""
    seq_lens = np.full(num_rows, prefix_len + own_len)
    num_shared, num_own = prefix_len // BLOCK_SIZE, -(-own_len // BLOCK_SIZE)
    deal = (np.random.default_rng(0).permutation(num_shared + num_rows * num_own) + 1).astype(np.int32)
    tables = np.hstack([np.tile(deal[:num_shared], (num_rows, 1)), deal[num_shared:].reshape(num_rows, num_own)])
    metadata = AttentionMetadata(
        num_tokens=num_rows,
        query_start_np=np.arange(num_rows + 1),
        seq_lens_np=seq_lens,
        block_tables_np=tables,
        query_start=torch.arange(num_rows + 1, dtype=torch.int32, device="cuda"),
        seq_lens=torch.from_numpy(seq_lens.astype(np.int32)).cuda(),
        block_tables=torch.from_numpy(tables).cuda(),
        max_query_len=1,
        max_seq_len=prefix_len + own_len,
        num_row_blocks=0,
        num_decode_rows=num_rows,
    )
    plan = plan_step(ScheduledBatch.of(seq_lens - 1, [1] * num_rows), TokenLayout(1))
    metadata.shared_prefix = find_shared_prefix(metadata, plan, tables, 0, BLOCK_SIZE)
    return metadata


def time_shared_prefix(repeats: int) -> list[dict[str, Any]]:
    """Rows that share a prefix: each reads it, or all read it once."""
    shared_prefix.MIN_SAVED_TOKENS = 1
    backend, rows = FlashAttnBackend(), []
    for name, spec in (("32 / 8 heads", LLAMA), ("16 / 4 heads", HALF_LLAMA), ("latents", LATENT)):
        for num_rows, prefix_len, own_len in SHARED_PREFIX:
            metadata = sharing_rows(num_rows, prefix_len, own_len)
            num_blocks = int(metadata.block_tables_np.max()) + 1
            layer_bytes = num_blocks * BLOCK_SIZE * spec.entry_width * 2
            layers = [
                torch.empty(num_blocks, BLOCK_SIZE, spec.entry_width, dtype=torch.bfloat16, device="cuda").normal_()
                for _ in range(min(64, -(-5 * L2_BYTES // layer_bytes)))
            ]
            query = torch.randn(num_rows, spec.num_heads, spec.qk_head_dim, device="cuda").bfloat16()

            def attend(
                layer: torch.Tensor,
                metadata: AttentionMetadata,
                query: torch.Tensor = query,
                spec: AttentionSpec = spec,
            ) -> object:
                return shared_prefix.attend(query, layer, spec, metadata, backend)

            apart, once = (
                graph_us(partial(attend, metadata=one), layers, repeats)
                for one in (replace(metadata, shared_prefix=None), metadata)
            )
            read = (prefix_len + num_rows * own_len) * spec.entry_width * 2
            floor = read / 3.35e6  # an H100's bandwidth
            rows.append(
                {
                    "kernel": "shared prefix", "heads": name, "batch": num_rows, "prefix": prefix_len, "own": own_len,
                    "us_apart": apart, "us_once": once, "us_floor": floor,
                }
            )  # fmt: skip
            print(
                f"{name:12} {num_rows:3} rows share {prefix_len:6} tokens, saved {(num_rows - 1) * prefix_len:8}: "
                f"{apart:9.1f} us, read once {once:8.1f} us, floor {floor:7.1f} us",
                flush=True,
            )
    return rows


def time_prefix_alone(repeats: int) -> list[dict[str, Any]]:
    """A prefix with the heads of many rows: how many runs it should be cut into."""
    rows = []
    for name, spec, tuning in (("32 / 8 heads", LLAMA, HEADS), ("latents", LATENT, LATENTS)):
        for num_rows in (2, 8, 32):
            case = DecodeCase(replace(spec, num_heads=spec.num_heads * num_rows), 1, 58880)
            for programs in (132, 264, 528, 768):
                us = case.time(PagedDecode(replace(tuning, programs=programs)), repeats)
                rows.append(
                    {"kernel": "prefix alone", "heads": name, "batch": num_rows, "programs": programs, "us": us}
                )
                print(
                    f"{name:12} {num_rows:3} rows, prefix of 58880 alone, {programs} programs: {us:8.1f} us", flush=True
                )
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
    parser.add_argument("--shared-prefix", action="store_true", help="only rows that share a prefix")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output-json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this needs a GPU")
    torch.manual_seed(0)
    if args.sweep:
        rows = sweep(args.repeats)
    elif args.shared_prefix:
        rows = time_shared_prefix(args.repeats) + time_prefix_alone(args.repeats)
    else:
        rows = time_decode(args.repeats) + time_shared_prefix(args.repeats) + time_prefill(args.repeats) + time_host()
    if args.output_json:
        args.output_json.write_text(json.dumps(environment() | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
