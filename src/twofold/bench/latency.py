"""latency of one batch, and of one decode step in it

Prompts are random token ids, without prefix caching. Prints the mean time of a whole batch and the median time of a
decode step; on a GPU also how long kernels run in it. The flags are those of `vllm bench latency`.
"""

import statistics
import time
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

import numpy as np

from twofold.bench.arguments import add_lengths, engine_arguments, write_json
from twofold.bench.report import bytes_per_token, describe
from twofold.engine.drive import Drive
from twofold.flags import whole_number
from twofold.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from twofold.engine.engine import LLMEngine

NUM_PROFILED = 16  # decode steps


def configure(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size", type=whole_number, default=8, metavar="N", help="prompts in a batch (default: 8)"
    )
    parser.add_argument(
        "--num-iters-warmup",
        type=whole_number,
        default=1,
        metavar="N",
        help="batches that are not measured (default: 1)",
    )
    parser.add_argument(
        "--num-iters", type=whole_number, default=3, metavar="N", help="batches that are measured (default: 3)"
    )
    add_lengths(parser, input_len=32, leave_out=("enable_prefix_caching",), defaults={"max_num_seqs": "the batch size"})


def run(args: Namespace) -> int:
    from twofold import LLM

    arguments = engine_arguments(args, args.input_len + args.output_len + 1, enable_prefix_caching=False)
    arguments.setdefault("max_num_seqs", args.batch_size)
    with LLM(**arguments) as llm:
        engine = llm.engine
        of_layout = {}
        for layout in engine.in_each_layout():
            of_layout[layout] = [
                time_batch(engine, args.batch_size, args.input_len, args.output_len, seed)
                for seed in range(args.num_iters_warmup + args.num_iters)
            ][args.num_iters_warmup :]
        busy = None
        if engine.runtime.device == "cuda":
            busy = profile_decode(engine, args.batch_size, args.input_len)
        settings = describe(engine) | {"bytes_per_token": bytes_per_token(engine)}
    batches = of_layout[settings["step_layout"]]
    latencies = [latency for latency, _ in batches]
    ms_of_layout = {layout: _median_step(batches) for layout, batches in of_layout.items()}
    decode_ms = ms_of_layout[settings["step_layout"]]
    result = settings | {
        "input_len": args.input_len,
        "output_len": args.output_len,
        "batch_size": args.batch_size,
        "avg_latency": statistics.mean(latencies),
        "latencies": latencies,
        "decode_ms_per_step": decode_ms,
        "decode_ms_of_layout": ms_of_layout,
        "decode_busy_ms_per_step": busy,
    }
    if busy is not None:
        print(f"GPU busy: {busy:.3f} ms per decode step")
    print(f"Avg latency: {result['avg_latency']:.4f} s")
    if decode_ms is not None:
        print(f"decode: {decode_ms:.3f} ms per step, batch {args.batch_size}, {result['pcp']} ranks")
        if len(ms_of_layout) > 1:
            print("by layout: " + ", ".join(f"{layout} {ms:.3f} ms" for layout, ms in ms_of_layout.items()))
    write_json(args, result)
    return 0


def _median_step(batches: list[tuple[float, list[float]]]) -> float | None:
    steps = [step for _, decode_steps in batches for step in decode_steps]
    return statistics.median(steps) if steps else None


def start_drive(engine: "LLMEngine") -> Drive:
    """A drive in which each step gives an output for every request that got a token."""
    return Drive(engine, output_kind=RequestOutputKind.DELTA, recover=False)


def add_batch(drive: Drive, vocab_size: int, batch_size: int, input_len: int, output_len: int, seed: int) -> None:
    """Adds random prompts."""
    rng = np.random.default_rng(seed)
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    for number in range(batch_size):
        drive.add(f"{seed} {number}", rng.integers(0, vocab_size, input_len).tolist(), params)


def time_batch(
    engine: "LLMEngine", batch_size: int, input_len: int, output_len: int, seed: int
) -> tuple[float, list[float]]:
    """→ seconds of the whole batch, and milliseconds of each decode step in which every request took part."""
    ends = [time.perf_counter()]
    num_outputs = []
    with start_drive(engine) as drive:
        add_batch(drive, engine.vocab_size, batch_size, input_len, output_len, seed)
        for outputs in drive:
            num_outputs.append(len(outputs))
            ends.append(time.perf_counter())
    durations = (np.diff(ends) * 1e3).tolist()
    full = [duration for duration, count in zip(durations, num_outputs, strict=True) if count == batch_size]
    return ends[-1] - ends[0], full[2:-1]  # the first ones may have prefilled, the last one had no step behind it


def profile_decode(engine: "LLMEngine", batch_size: int, input_len: int) -> float:
    """Milliseconds of a decode step in which any kernel of the first rank runs. Prints the longest kernels."""
    with start_drive(engine) as drive:
        add_batch(drive, engine.vocab_size, batch_size, input_len, NUM_PROFILED + 8, seed=10**6)
        while len(next(drive)) < batch_size:  # until the last prompt has its first token
            pass
        engine.profile(True)
        for _ in range(NUM_PROFILED):
            next(drive)
        breakdown = engine.profile(False)[0]
        for _ in drive:
            pass
    assert breakdown is not None
    num_launched = NUM_PROFILED + engine.max_steps_in_flight - 1
    for name, total, count in breakdown.kernels[:12]:
        print(f"  {total / num_launched:8.3f} ms  {count / num_launched:6.1f} x  {name[:100]}")
    return breakdown.busy / num_launched
