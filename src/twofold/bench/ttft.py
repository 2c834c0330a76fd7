"""time to first token, for prompt lengths × numbers of ranks, on any model

Prompts are random token ids, without prefix caching; answers have one token. Measures the wall time of `generate`: the
median of --repeats runs after one that is not counted. On a GPU one more, profiled run tells where the time goes.
"""

import json
import statistics
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from twofold.bench.arguments import add_common, engine_arguments, write_json
from twofold.bench.report import bytes_per_token, describe, machine, print_table
from twofold.errors import ConfigError
from twofold.flags import whole_number
from twofold.server.config import public_name

if TYPE_CHECKING:
    from twofold import LLM
    from twofold.contract import Breakdown

PARTS = ("busy", "projections", "attention", "exchange", "exposed_exchange")  # of a breakdown
HEADER = ("prompt", "ranks", "median ms", "min ms", "speed-up", *PARTS[:-1], "exposed")


def configure(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--lens", default="2048,8192", metavar="N,N", help="prompt lengths in tokens (default: 2048,8192)"
    )
    parser.add_argument(
        "--repeats", type=whole_number, default=3, metavar="N", help="measured runs for each length (default: 3)"
    )
    parser.add_argument(
        "--png", metavar="FILE", help="draw time against length, speed-up against ranks, and where a GPU's time goes"
    )
    add_common(
        parser,
        {"max_model_len": "the longest prompt + 1"},
        several_sizes=True,
        leave_out=("enable_prefix_caching",),
    )


def run(args: Namespace) -> int:
    lens, sizes = _numbers("--lens", args.lens), _numbers("-pcp", args.sizes)
    rows = []
    for size in sizes:
        arguments = engine_arguments(
            args, max(lens) + 1, enable_prefix_caching=False, prefill_context_parallel_size=size
        )
        rows += measure(lens, args.repeats, arguments)
    print_table(HEADER, [_cells(row, rows) for row in rows])
    traffic = rows[-1]["bytes_per_token"]
    print(
        f"the KV entries of a token: {traffic['stored']:,.0f} bytes stored, "
        f"{traffic['exchanged']:,.0f} sent to each other rank"
    )
    write_json(args, {"dtype": rows[0]["dtype"], "rows": rows})
    if args.png:
        from twofold.bench.draw import draw_ttft

        name = public_name(args.model)
        draw_ttft(rows, f"{name}, {rows[0]['dtype']}, on {machine()}", Path(args.png))
    return 0


def measure(lens: list[int], repeats: int, engine_args: dict[str, Any]) -> list[dict[str, Any]]:
    """Starts an engine and measures each length → one row for each: {prompt_len, pcp, median_ms, min_ms, …}."""
    from twofold import LLM

    rows = []
    start = time.perf_counter()
    with LLM(**engine_args) as llm:
        engine, ready = llm.engine, time.perf_counter() - start
        rng = np.random.default_rng(0)
        seconds = {name: round(value, 2) for name, value in engine.reports[0].seconds.items()}
        num_ranks = engine.runtime.num_ranks
        parts = ", ".join(f"{name} {value}" for name, value in seconds.items())
        print(f"{num_ranks} rank{'s' * (num_ranks > 1)} ready after {ready:.1f} s (of that {parts})", flush=True)
        for length in lens:
            of_layout = {}
            for layout in engine.in_each_layout():
                _time_one(llm, length, rng)
                of_layout[layout] = [_time_one(llm, length, rng) for _ in range(repeats)]
            times = of_layout[engine.runtime.engine.step_layout]
            row: dict[str, Any] = describe(engine) | {
                "prompt_len": length,
                "median_ms": round(statistics.median(times), 3),
                "min_ms": round(min(times), 3),
                "all_ms": [round(value, 3) for value in times],
                "median_ms_of_layout": {layout: round(statistics.median(ms), 3) for layout, ms in of_layout.items()},
                "max_num_batched_tokens": engine.runtime.max_num_batched_tokens,
                "bytes_per_token": bytes_per_token(engine),
                "startup_s": seconds,
            }
            if engine.runtime.device == "cuda":
                engine.profile(True)
                _time_one(llm, length, rng)
                row |= _parts([part for part in engine.profile(False) if part is not None])
            rows.append(row)
            print(json.dumps({k: v for k, v in row.items() if k not in ("kernels", "startup_s")}), flush=True)
    return rows


def _time_one(llm: "LLM", length: int, rng: np.random.Generator) -> float:
    """Milliseconds until a random prompt of this length has its first token."""
    from twofold import SamplingParams

    prompt = {"prompt_token_ids": rng.integers(0, llm.engine.vocab_size, length).tolist()}
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    start = time.perf_counter()
    llm.generate(prompt, params, use_tqdm=False)
    return (time.perf_counter() - start) * 1e3


def _parts(breakdowns: list["Breakdown"]) -> dict[str, Any]:
    """Where each rank's time went, in milliseconds."""
    of_ranks = [
        {kind: round(value, 3) for kind, value in one.kinds.items()}
        | {"exposed_exchange": round(one.exposed_exchange, 3), "busy": round(one.busy, 3)}
        for one in breakdowns
    ]
    return {
        "breakdown_ms_of_ranks": of_ranks,
        # The rank that waits least for the others shows what the exchange itself costs.
        "breakdown_ms": min(of_ranks, key=lambda part: part["exposed_exchange"]),
        "kernels": [(name[:90], round(ms, 3), count) for name, ms, count in breakdowns[0].kernels],
    }


def _numbers(flag: str, text: str) -> list[int]:
    try:
        numbers = [whole_number(part) for part in text.split(",")]
    except ArgumentTypeError:
        numbers = []
    if not numbers or min(numbers) < 1:
        field = flag.strip("-")
        raise ConfigError(f"{flag} must be integers of at least 1, separated by commas, got {text!r}", field=field)
    return numbers


def _cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    base = next((r for r in rows if r["prompt_len"] == row["prompt_len"] and r["pcp"] == 1), None)
    parts = row.get("breakdown_ms", {})
    return [
        str(row["prompt_len"]),
        str(row["pcp"]),
        f"{row['median_ms']:.1f}",
        f"{row['min_ms']:.1f}",
        f"{base['median_ms'] / row['median_ms']:.2f}×" if base and len({r["pcp"] for r in rows}) > 1 else "",
        *(f"{parts[part]:.1f}" if part in parts else "" for part in PARTS),
    ]
