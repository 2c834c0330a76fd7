"""latency of one batch: prompts of --input-len tokens, answers of --output-len

The flags are vLLM's. Prints the mean time of a whole batch, and of one decoding step within it.
"""

import json
import statistics
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from twofold.bench.report import bytes_per_token, environment
from twofold.cli.arguments import add_engine_arguments, chosen
from twofold.config import EngineConfig

if TYPE_CHECKING:
    from twofold import LLM


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("--input-len", type=int, default=32, help="tokens of each prompt (default: 32)")
    parser.add_argument("--output-len", type=int, default=128, help="tokens of each answer (default: 128)")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts at once (default: 8)")
    parser.add_argument("--num-iters-warmup", type=int, default=1, help="batches not counted (default: 1)")
    parser.add_argument("--num-iters", type=int, default=3, help="batches measured (default: 3)")
    parser.add_argument("--output-json", metavar="FILE", help="write every figure there")
    add_engine_arguments(parser)


def run(args: Namespace) -> int:
    from twofold import LLM, SamplingParams

    arguments = chosen(args, EngineConfig) | {"enable_prefix_caching": False, "skip_tokenizer_init": True}
    arguments.setdefault("max_model_len", args.input_len + args.output_len + 1)
    arguments.setdefault("max_num_seqs", args.batch_size)
    rng = np.random.default_rng(0)
    latencies: list[float] = []
    steps: list[float] = []  # milliseconds of decode steps in which every request took part
    with LLM(**arguments) as llm:
        engine = llm.engine
        for iteration in range(args.num_iters_warmup + args.num_iters):
            start = time.perf_counter()
            for number in range(args.batch_size):
                prompt = rng.integers(0, engine.vocab_size, args.input_len).tolist()
                params = SamplingParams(temperature=0, max_tokens=args.output_len, ignore_eos=True)
                engine.add_request(f"{iteration} {number}", {"prompt_token_ids": prompt}, params)
            ends = [start]
            changed: list[int] = []
            while engine.has_unfinished_requests or engine.scheduler.num_in_flight:
                changed.append(len(engine.step()))
                ends.append(time.perf_counter())
            if iteration >= args.num_iters_warmup:
                latencies.append(ends[-1] - start)
                durations = np.diff(ends) * 1e3
                full = [number for number, count in enumerate(changed) if count == args.batch_size]
                steps += [float(durations[number]) for number in full[2:-1]]
        busy = None
        if engine.runtime.device == "cuda":
            busy = profile_decode(llm, args.batch_size, args.input_len)
        result = environment() | {
            "model": args.model,
            "dtype": str(engine.runtime.dtype).removeprefix("torch."),
            "pcp": engine.runtime.num_ranks,
            "input_len": args.input_len,
            "output_len": args.output_len,
            "batch_size": args.batch_size,
            "avg_latency": statistics.mean(latencies),
            "latencies": latencies,
            "decode_ms_per_step": statistics.median(steps) if steps else None,
            "decode_busy_ms_per_step": busy,
            "bytes_per_token": bytes_per_token(engine),
        }
    if busy is not None:
        print(f"GPU busy: {busy:.3f} ms a decode step")
    print(f"Avg latency: {result['avg_latency']:.4f} s")
    if steps:
        print(f"decode: {result['decode_ms_per_step']:.3f} ms a step, batch {args.batch_size}, {result['pcp']} ranks")
    if args.output_json:
        Path(args.output_json).write_text(json.dumps(result, indent=1))
    return 0


def profile_decode(llm: "LLM", batch_size: int, input_len: int) -> float:
    """Milliseconds a decode step in which any kernel of the first rank runs; prints the longest."""
    from twofold import SamplingParams
    from twofold.executor.local import LocalExecutor

    engine, executor, num_steps = llm.engine, llm.engine.executor, 16
    assert isinstance(executor, LocalExecutor)
    rng = np.random.default_rng(1)
    params = SamplingParams(temperature=0, max_tokens=num_steps + 8, ignore_eos=True)
    for number in range(batch_size):
        engine.add_request(f"profile {number}", rng.integers(0, engine.vocab_size, input_len).tolist(), params)
    while len(engine.step()) < batch_size:  # the last prompt's first token
        pass
    executor.profile(True)
    for _ in range(num_steps):
        engine.step()
    breakdown = executor.profile(False)[0]
    assert breakdown is not None
    while engine.has_unfinished_requests or engine.scheduler.num_in_flight:
        engine.step()
    launches = max(1, num_steps + engine.max_steps_in_flight - 1)
    for name, total, count in breakdown.kernels[:12]:
        print(f"  {total / launches:8.3f} ms  {count / launches:6.1f} x  {name[:100]}")
    return breakdown.busy / launches
