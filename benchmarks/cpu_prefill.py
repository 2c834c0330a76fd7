"""Measure prefill on a CPU: Twofold on one and two ranks, and Transformers' forward pass, in one run.

    python benchmarks/cpu_prefill.py [--dtype bfloat16] [--lens 512,2048,8000] [--output-json FILE]

Scaling compares the TTFT of --scaling-len tokens on one rank of one thread and on two ranks of one thread each.
Overhead compares the TTFT of one rank with all threads and Transformers' forward pass over the same prompt (logits of
the last token only, no cache), with the same threads and dtype. The model is the demo model. Runs take turns, and
medians are compared.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from twofold import LLM, SamplingParams
from twofold.bench.report import environment, print_table
from twofold.machine import usable_cores
from twofold.models.source import demo_directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--lens", default="512,2048,8000")
    parser.add_argument("--scaling-len", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output-json")
    args = parser.parse_args()
    threads = usable_cores()
    lens = [int(part) for part in args.lens.split(",")]
    rng = np.random.default_rng(0)
    prompts = {n: rng.integers(0, 49152, n).tolist() for n in [*lens, args.scaling_len]}
    rows: list[dict[str, Any]] = []

    def row(name: str, length: int, num_threads: int, times: list[float], **more: Any) -> dict[str, Any]:
        median = round(statistics.median(times), 4)
        entry = {"what": name, "prompt_len": length, "threads": num_threads, "median_s": median, "all_s": times} | more
        print(json.dumps(entry), flush=True)
        rows.append(entry)
        return entry

    # Overhead: both models stay loaded and take turns.
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(demo_directory(), dtype=getattr(torch, args.dtype)).eval()
    ratios = {}
    with engine(1, threads, args.dtype) as llm:
        for length in lens:
            ours, theirs = [], []
            for turn in range(args.repeats * max(1, 4096 // length) + 1):  # short prompts suffer most from other load
                theirs.append(forward(model, prompts[length]))
                ours.append(ttft(llm, prompts[length]))
                if turn == 0:
                    ours, theirs = [], []  # warm-up
            a = row("twofold, 1 rank", length, threads, ours)
            b = row("transformers forward", length, threads, theirs)
            ratios[length] = round(b["median_s"] / a["median_s"], 3)
    del model
    # Scaling: both engines stay loaded and take turns, because other load comes and goes.
    times: dict[int, list[float]] = {1: [], 2: []}
    with engine(1, 1, args.dtype) as one, engine(2, 1, args.dtype) as two:
        for turn in range(args.repeats + 1):
            for size, llm in ((1, one), (2, two)):
                seconds = ttft(llm, prompts[args.scaling_len])
                if turn:  # the first turn is a warm-up
                    times[size].append(seconds)
    alone, together = (
        row(f"twofold, {size} rank{'s' * (size > 1)}", args.scaling_len, 1, times[size])["median_s"] for size in (1, 2)
    )
    speed_up = round(alone / together, 3)
    print_table(
        ["what", "tokens", "threads a rank", "seconds"],
        [[r["what"], str(r["prompt_len"]), str(r["threads"]), f"{r['median_s']:.3f}"] for r in rows],
    )
    print(f"Transformers' time over Twofold's, same threads: {ratios}")
    print(f"{args.scaling_len} tokens, 2 ranks of one thread over 1 rank of one thread: {speed_up}x")
    if args.output_json:
        result = environment() | {
            "dtype": args.dtype,
            "transformers_over_twofold": ratios,
            "speed_up_2_ranks": speed_up,
            "rows": rows,
        }
        Path(args.output_json).write_text(json.dumps(result, indent=1) + "\n")


def engine(size: int, num_threads: int, dtype: str) -> LLM:
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    return LLM(
        "demo",
        prefill_context_parallel_size=size,
        dtype=dtype,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_num_batched_tokens=8192,
        max_num_seqs=4,
    )


def ttft(llm: LLM, prompt: list[int]) -> float:
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    start = time.perf_counter()
    llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    return time.perf_counter() - start


@torch.inference_mode()
def forward(model: Any, prompt: list[int]) -> float:
    input_ids = torch.tensor([prompt])
    start = time.perf_counter()
    model(input_ids, use_cache=False, logits_to_keep=1).logits.argmax(-1)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
