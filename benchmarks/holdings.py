"""Time prompts and answers with whole and with sharded weights, one engine after the other, in one call.

    python benchmarks/holdings.py --model configs/Llama-3.1-8B --load-format dummy -pcp 2 --output-json F
    python benchmarks/holdings.py --model configs/Llama-3.1-70B --load-format dummy -pcp 2 --weights sharded

Times are medians in milliseconds of the whole engine, as in `layouts.py`: in each layout of a step, and as the engine
chooses. With both holdings the table ends with sharded over whole, of steps as the engine chooses them.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from layouts import NUM_STEPS, decode_ms, ttft_ms

from twofold import LLM
from twofold.bench.report import describe, environment, print_table
from twofold.config import EngineConfig
from twofold.flags import add_engine_arguments, chosen


def measure(arguments: dict[str, Any], whats: list[int | str], in_each_layout: bool) -> dict[str, Any]:
    start = time.perf_counter()
    with LLM(**arguments, skip_tokenizer_init=True) as llm:
        engine = llm.engine
        report = engine.reports[0]
        ready = round(time.perf_counter() - start, 1)
        print(arguments["weights"], f"ready after {ready} s", report.seconds, engine.step_costs, flush=True)
        times: dict[str, dict[str, float]] = {}
        for what in whats:
            name = f"TTFT {what}" if isinstance(what, int) else f"decode {what}"
            times[name] = {}
            for layout in engine.in_each_layout():
                ms = ttft_ms(engine, what) if isinstance(what, int) else decode_ms(engine, what)
                times[name][layout] = round(ms, 3)
                if not in_each_layout:
                    break
            print(name, times[name], flush=True)
        return {
            "weights": arguments["weights"],
            "ready_seconds": ready,
            "start_up_seconds": report.seconds,
            "weight_bytes": report.weight_bytes,
            "max_cache_bytes": min(report.max_cache_bytes for report in engine.reports),
            "tokens_in_cache": min(report.num_blocks for report in engine.reports) * engine.runtime.block_size,
            "costs": str(engine.step_costs),
            "only_by_tokens": report.only_by_tokens,
            "settings": describe(engine),
            "ms": times,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser)
    parser.add_argument("--lens", default="1024,2048,8192,32768")
    parser.add_argument("--decodes", default="1024x1,1024x8,1024x32")
    parser.add_argument("--in-each-layout", action="store_true", help="also all steps by tokens, and all by heads")
    parser.add_argument("--output-json")
    args = parser.parse_args()
    whats: list[int | str] = [int(n) for n in args.lens.split(",") if n]
    decodes = [name for name in args.decodes.split(",") if name]
    contexts = [int(name.rstrip("=").split("x")[0]) for name in decodes]
    arguments = chosen(args, EngineConfig)
    arguments.setdefault("max_model_len", max([*(n for n in whats if isinstance(n, int)), *contexts]) + NUM_STEPS + 16)
    arguments.setdefault("max_num_seqs", 32)
    asked = arguments.pop("weights", "auto")
    holdings = ("replicated", "sharded") if asked == "auto" else (asked,)
    runs = [measure(arguments | {"weights": weights}, [*whats, *decodes], args.in_each_layout) for weights in holdings]
    chosen_layout = next(iter(next(iter(runs[0]["ms"].values()))))
    rows = []
    for what in runs[0]["ms"]:
        ms = [run["ms"][what][chosen_layout] for run in runs]
        ratio = [f"{ms[1] / ms[0]:.3f}"] if len(ms) == 2 else []
        rows.append([what, *map(str, ms), *ratio])
    print_table(["ms", *holdings, *(["ratio"] if len(holdings) == 2 else [])], rows)
    if args.output_json:
        Path(args.output_json).write_text(
            json.dumps({"environment": environment(), "runs": runs}, indent=1, default=str) + "\n"
        )


if __name__ == "__main__":
    main()
