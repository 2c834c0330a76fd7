"""Time prompts and answers in each layout of a step, in one engine: by tokens, by heads, and as the engine chooses.

    python benchmarks/layouts.py --model configs/Llama-3.1-8B --load-format dummy -pcp 2 --lens 16,256,1024 \
        --decodes 1024x1,1024x32,65536x1,58880x8= --output-json F

A decode is CONTEXTxBATCH; a `=` after it gives all requests the same prompt. Times are medians in milliseconds, of the
whole engine: from the request to its token, and from one step's tokens to the next one's.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from twofold import LLM
from twofold.bench.latency import start_drive
from twofold.bench.report import describe, environment, print_table
from twofold.config import EngineConfig
from twofold.engine.engine import LLMEngine
from twofold.flags import add_engine_arguments, chosen
from twofold.sampling_params import SamplingParams

NUM_STEPS = 48  # of which the median is taken
NUM_PROMPTS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, lens="16,256,1024", decodes="1024x1,1024x8")
    parser.add_argument("--profile", help="decodes to list kernels of, e.g. 1024x1", default="")
    args = parser.parse_args()
    arguments, whats = read_arguments(args)
    start = time.perf_counter()
    with LLM(**arguments, skip_tokenizer_init=True) as llm:
        engine = llm.engine
        print(f"ready after {time.perf_counter() - start:.1f} s", engine.reports[0].seconds)
        print("costs of steps:", engine.step_costs, engine.reports[0].only_by_tokens or "", flush=True)
        rows = []
        for what in whats:
            row = {"what": title(what)}
            for layout in engine.in_each_layout():
                row[layout] = time_ms(engine, what)
            rows.append(row)
            print(row, flush=True)
        for name in [name for name in args.profile.split(",") if name]:
            for layout in engine.in_each_layout():
                print(f"--- {name} {layout}", flush=True)
                decode_ms(engine, name, profile=True)
        result = {"settings": describe(engine), "costs": str(engine.step_costs), "environment": environment()}
    print_table(list(rows[0]), [[str(value) for value in row.values()] for row in rows])
    if args.output_json:
        Path(args.output_json).write_text(json.dumps(result | {"ms": rows}, indent=1, default=str) + "\n")


def add_arguments(parser: argparse.ArgumentParser, *, lens: str, decodes: str) -> None:
    """The engine's arguments, what to time with its defaults, and --output-json."""
    add_engine_arguments(parser)
    parser.add_argument("--lens", default=lens)
    parser.add_argument("--decodes", default=decodes)
    parser.add_argument("--output-json")


def read_arguments(args: argparse.Namespace) -> tuple[dict[str, Any], list[int | str]]:
    """→ the engine's arguments, and what to time: a prompt's length, or the name of decodes."""
    lens = [int(n) for n in args.lens.split(",") if n]
    decodes = [name for name in args.decodes.split(",") if name]
    longest = max([*lens, *(int(name.split("x")[0]) for name in decodes)])
    arguments = {"max_model_len": longest + NUM_STEPS + 16, "max_num_seqs": 32} | chosen(args, EngineConfig)
    return arguments, [*lens, *decodes]


def title(what: int | str) -> str:
    return f"TTFT {what}" if isinstance(what, int) else f"decode {what}"


def time_ms(engine: LLMEngine, what: int | str) -> float:
    return round(ttft_ms(engine, what) if isinstance(what, int) else decode_ms(engine, what), 3)


def ttft_ms(engine: LLMEngine, length: int) -> float:
    """Of prompts that share nothing with those before."""
    times = []
    for _ in range(NUM_PROMPTS if length < 50_000 else 3):
        rng = np.random.default_rng(time.perf_counter_ns())
        ids = rng.integers(0, engine.vocab_size, length).tolist()
        with start_drive(engine) as drive:
            start = time.perf_counter()
            drive.add("prompt", ids, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
            for _ in drive:
                times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[1:])


def decode_ms(engine: LLMEngine, name: str, profile: bool = False) -> float:
    """A step of a batch of decodes."""
    context, batch = (int(part) for part in name.rstrip("=").split("x"))
    rng = np.random.default_rng(context + batch)
    params = SamplingParams(temperature=0, max_tokens=NUM_STEPS + 8, ignore_eos=True)
    prompt = rng.integers(0, engine.vocab_size, context).tolist()
    ends = []
    with start_drive(engine) as drive:
        for number in range(batch):
            if not name.endswith("="):
                prompt = rng.integers(0, engine.vocab_size, context).tolist()
            drive.add(f"{number}", prompt, params)
        for outputs in drive:
            if len(outputs) == batch:
                ends.append(time.perf_counter())
                if profile and len(ends) == 8:
                    engine.profile(True)
                if profile and len(ends) == 24:
                    breakdown = engine.profile(False)[0]
    steps = np.diff(ends)[3:-2] * 1e3
    if profile and breakdown is not None:
        num_launched = 16 + engine.max_steps_in_flight - 1
        print(
            f"busy {breakdown.busy / num_launched:.3f} ms",
            {k: round(v / num_launched, 3) for k, v in breakdown.kinds.items()},
        )
        for kernel, total, count in breakdown.kernels[:22]:
            print(f"  {total / num_launched:8.4f} ms  {count / num_launched:6.1f} x  {kernel[:100]}")
    return float(np.median(steps))


if __name__ == "__main__":
    main()
