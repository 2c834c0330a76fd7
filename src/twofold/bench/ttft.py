"""time to first token: prompt lengths × ranks, on any model

Each prompt is random token ids, answered with one token, prefix caching off: wall time of `generate`, the median of
--repeats after a warm-up. On a GPU one more, profiled run tells where the time goes.
"""

import json
import statistics
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import numpy as np

from twofold.bench.report import bytes_per_token, environment, print_table
from twofold.cli.arguments import add_engine_arguments, chosen
from twofold.config import EngineConfig
from twofold.errors import ConfigError


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("--lens", default="2048,8192", help="prompt lengths in tokens (default: 2048,8192)")
    parser.add_argument("--repeats", type=int, default=3, help="measured runs of each length (default: 3)")
    parser.add_argument("--output-json", metavar="FILE", help="write every figure there")
    parser.add_argument("--png", metavar="FILE", help="draw time against length, speed-up against ranks, and its parts")
    add_engine_arguments(parser)
    parser.set_defaults(prefill_context_parallel_size=None)
    for action in parser._actions:
        if action.dest == "prefill_context_parallel_size":
            action.type, action.metavar, action.default = str, "N,N", "1"
            action.help = "numbers of ranks (default: 1)"


def run(args: Namespace) -> int:
    lens = _numbers("--lens", args.lens)
    sizes = _numbers("-pcp", args.prefill_context_parallel_size or "1")
    arguments = chosen(args, EngineConfig) | {"enable_prefix_caching": False, "skip_tokenizer_init": True}
    arguments.setdefault("max_model_len", max(lens) + 1)
    rows = []
    for size in sizes:
        rows += measure(lens, args.repeats, arguments | {"prefill_context_parallel_size": size})
    print_table(
        [
            "prompt",
            "ranks",
            "median ms",
            "min ms",
            "speed-up",
            "busy",
            "projections",
            "attention",
            "exchange",
            "exposed",
        ],
        [_cells(row, rows) for row in rows],
    )
    traffic = rows[-1]["bytes_per_token"]
    print(f"a token's rows: {traffic['stored']:,.0f} bytes stored, {traffic['exchanged']:,.0f} sent to each other rank")
    if args.output_json:
        result = environment() | {"model": args.model, "dtype": rows[0]["dtype"], "rows": rows}
        Path(args.output_json).write_text(json.dumps(result, indent=1))
    if args.png:
        from twofold.bench.draw import draw_ttft

        draw_ttft(rows, Path(args.png))
    return 0


def measure(lens: list[int], repeats: int, engine_args: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each length: {prompt_len, pcp, median_ms, min_ms, breakdown_ms, …}."""
    from twofold import LLM, SamplingParams
    from twofold.executor.local import LocalExecutor

    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    rng = np.random.default_rng(0)
    rows = []
    start = time.perf_counter()
    with LLM(**engine_args) as llm:
        runtime, executor = llm.engine.runtime, llm.engine.executor
        ready = time.perf_counter() - start
        seconds = {name: round(value, 2) for name, value in executor.reports[0].seconds.items()}
        print(f"{runtime.num_ranks} ranks ready in {ready:.1f} s: {seconds}", flush=True)
        for length in lens:

            def once(length: int = length) -> float:
                prompt = {"prompt_token_ids": rng.integers(0, llm.engine.vocab_size, length).tolist()}
                begin = time.perf_counter()
                llm.generate(prompt, params, use_tqdm=False)
                return (time.perf_counter() - begin) * 1e3

            once()
            times = [once() for _ in range(repeats)]
            row: dict[str, Any] = {
                "prompt_len": length,
                "pcp": runtime.num_ranks,
                "median_ms": round(statistics.median(times), 3),
                "min_ms": round(min(times), 3),
                "all_ms": [round(value, 3) for value in times],
                "dtype": str(runtime.dtype).removeprefix("torch."),
                "max_num_batched_tokens": runtime.max_num_batched_tokens,
                "bytes_per_token": bytes_per_token(llm.engine),
                "startup_s": seconds,
            }
            if runtime.device == "cuda" and isinstance(executor, LocalExecutor):
                executor.profile(True)
                once()
                parts = [part for part in executor.profile(False) if part is not None]
                row["breakdown_ms_of_ranks"] = [
                    {kind: round(value, 3) for kind, value in part.kinds.items()}
                    | {"exposed_exchange": round(part.exposed_exchange, 3), "busy": round(part.busy, 3)}
                    for part in parts
                ]
                # The rank that waits least for the others shows what the exchange itself costs.
                row["breakdown_ms"] = min(row["breakdown_ms_of_ranks"], key=lambda part: part["exposed_exchange"])
                row["kernels"] = [(name[:90], round(ms, 3), count) for name, ms, count in parts[0].kernels]
            rows.append(row)
            print(json.dumps({k: v for k, v in row.items() if k not in ("kernels", "startup_s")}), flush=True)
    return rows


def _numbers(flag: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"{flag} must be numbers of at least 1, separated by commas, got {text!r}")
    return numbers


def _cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    base = next((r for r in rows if r["prompt_len"] == row["prompt_len"] and r["pcp"] == 1), None)
    parts = row.get("breakdown_ms", {})
    return [
        str(row["prompt_len"]),
        str(row["pcp"]),
        f"{row['median_ms']:.1f}",
        f"{row['min_ms']:.1f}",
        f"{base['median_ms'] / row['median_ms']:.2f}×" if base else "",
        *(
            f"{parts[name]:.1f}" if name in parts else ""
            for name in ("busy", "projections", "attention", "exchange", "exposed_exchange")
        ),
    ]
