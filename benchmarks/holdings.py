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

from layouts import add_arguments, read_arguments, time_ms, title

from twofold import LLM
from twofold.bench.report import describe, environment, print_table


def measure(arguments: dict[str, Any], whats: list[int | str], in_each_layout: bool) -> dict[str, Any]:
    start = time.perf_counter()
    with LLM(**arguments, skip_tokenizer_init=True) as llm:
        engine = llm.engine
        report = engine.reports[0]
        ready = round(time.perf_counter() - start, 1)
        print(arguments["weights"], f"ready after {ready} s", report.seconds, engine.step_costs, flush=True)
        times: dict[str, dict[str, float]] = {}
        for what in whats:
            name = title(what)
            times[name] = {}
            for layout in engine.in_each_layout():
                times[name][layout] = time_ms(engine, what)
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
    add_arguments(parser, lens="1024,2048,8192,32768", decodes="1024x1,1024x8,1024x32")
    parser.add_argument("--in-each-layout", action="store_true", help="also all steps by tokens, and all by heads")
    args = parser.parse_args()
    arguments, whats = read_arguments(args)
    asked = arguments.pop("weights", "auto")
    holdings = ("replicated", "sharded") if asked == "auto" else (asked,)
    runs = [measure(arguments | {"weights": weights}, whats, args.in_each_layout) for weights in holdings]
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
