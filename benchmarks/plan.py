"""Compare the times that `twofold plan` says with committed measurements on GPUs; fit its figures to some of them.

    python benchmarks/plan.py check --output-json benchmarks/results/plan-check.json
    python benchmarks/plan.py fit

`fit` prints the values of `HOPPER` in `planning/processors.py`. It uses rows of the role "fit": those of one H200 and
of two with whole caches, and one of H100s, the only measurement of experts that are divided in a long prompt. `check`
judges by the others: two H100s, and two H200s with sharded caches. Rows "apart" are not planned: requests that have one
prompt share its entries and choose the same experts.
"""

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes import CONFIGS
from transformers import CONFIG_MAPPING

from twofold.bench.report import environment, print_table
from twofold.models.sizes import model_shape
from twofold.planning.processors import HOPPER, KNOWN, Reach
from twofold.planning.room import Wish, choose
from twofold.planning.shape import ModelShape
from twofold.planning.times import Setup, TimeModel, with_reach

RESULTS = Path(__file__).parent / "results"
LIMIT = 0.10
DIVIDED_EXPERTS = "DeepSeek-V2-Lite", "TTFT 8192", "heads"
# What is fitted: times and shares, each by its logarithm.
FITTED = [
    name
    for name in Reach.__dataclass_fields__
    if name not in ("source", "products", "activations", "attention", "fetch", "peer", "sum")
]


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement."""

    source: str  # file of benchmarks/results
    model: str
    gpu: str
    setup: Setup
    what: str  # "TTFT n", "step n" without the engine, or "decode CONTEXTxBATCH"
    ms: float
    role: str  # "fit" or "judge"
    note: str = ""


def rows() -> list[Row]:
    return [*_of_one_h200(), *_of_two_h200(), *_of_two_h100()]


def _of_one_h200() -> Iterator[Row]:
    for model, name in (("Llama-3.1-8B", "llama-3.1-8b"), ("DeepSeek-V2-Lite", "deepseek-v2-lite")):
        for batch in (1, 32):
            source = f"h200-x1-{name}-decode-b{batch}.json"
            ms = _read(source)["decode_ms_per_step"]
            yield Row(source, model, "h200", Setup(1), f"decode 1024x{batch}", ms, "fit")
        source = f"h200-x1-{name}-ttft.json"
        for row in _read(source)["rows"]:
            setup = Setup(1, max_num_batched_tokens=row["max_num_batched_tokens"])
            yield Row(source, model, "h200", setup, f"TTFT {row['prompt_len']}", row["median_ms"], "fit")
        source = f"h200-x1-{name}-rank-alone-of-4.json"
        for row in _read(source)["rows"]:
            setup = Setup(4, step_layout="tokens", max_num_batched_tokens=4 * 32768)
            note = "one rank of four alone: no exchange"
            yield Row(source, model, "h200", setup, f"TTFT {row['prompt_len']}", row["slowest_ms"], "fit", note)


def _of_two_h200() -> Iterator[Row]:
    source, model = "h200-x2-llama-3.1-8b-sharded-cache.json", "Llama-3.1-8B"
    found = _read(source)
    for row in found["replicated"]["ms"]:
        for layout in ("tokens", "heads"):
            yield Row(source, model, "h200", Setup(2, step_layout=layout), row["what"], row[layout], "fit")
    for tokens, by_tokens, by_heads in json.loads(found["replicated"]["settings"]["step_costs"])["prefill"]:
        for layout, ms in (("tokens", by_tokens), ("heads", by_heads)):
            yield Row(source, model, "h200", Setup(2, step_layout=layout), f"step {tokens}", ms, "fit")
    for row in found["sharded"]["ms"]:
        yield Row(source, model, "h200", Setup(2, shards_cache=True), row["what"], row["auto"], "judge")
    source = "h200-x2-llama-3.1-8b-million.json"
    found, setup = _read(source), Setup(2, shards_cache=True)
    yield Row(source, model, "h200", setup, f"TTFT {found['prompt']}", found["ttft_s"] * 1e3, "judge")
    yield Row(source, model, "h200", setup, f"decode {found['prompt']}x1", found["decode_ms"], "judge")
    source = "h200-x2-llama-3.1-8b-ttft.json"
    for row in _read(source)["rows"]:
        setup = Setup(2, step_layout="tokens")
        yield Row(source, model, "h200", setup, f"TTFT {row['prompt_len']}", row["median_ms"], "judge")


def _of_two_h100() -> Iterator[Row]:
    for model, name in (("Llama-3.1-8B", "llama-3.1-8b"), ("DeepSeek-V2-Lite", "deepseek-v2-lite")):
        source = f"h100-x2-{name}-layouts.json"
        for row in _read(source)["ms"]:
            is_apart = row["what"].endswith("=")
            for layout in ("tokens", "heads"):
                role = "fit" if (model, row["what"], layout) == DIVIDED_EXPERTS else "apart" if is_apart else "judge"
                note = "all requests have one prompt" if is_apart else ""
                yield Row(source, model, "h100", Setup(2, step_layout=layout), row["what"], row[layout], role, note)
    source = "h100-x2-before-after.json"
    for found in _read(source)["rows"]:
        if found["label"] != "after":
            continue
        setup = Setup(found["pcp"], step_layout="tokens", max_num_batched_tokens=32768 * found["pcp"])
        for length, (median, _) in found["ttft_ms"].items():
            yield Row(source, found["model"], "h100", setup, f"TTFT {length}", median, "judge")


def _read(source: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / source).read_text())
    return found


def shapes() -> dict[str, ModelShape]:
    """Of each model in bfloat16."""
    made = {}
    for name in ("Llama-3.1-8B", "DeepSeek-V2-Lite"):
        config = dict(CONFIGS[name])
        made[name] = model_shape(CONFIG_MAPPING[config.pop("model_type")](**config), torch.bfloat16)
    return made


def planned_ms(row: Row, shape: ModelShape, reach: Reach | None = None) -> float:
    gpu = KNOWN[row.gpu] if reach is None else replace(KNOWN[row.gpu], reach=reach)
    if "rank-alone" in row.source:
        gpu = replace(with_reach(gpu, exchange=0.0), link=1e18)
    model = TimeModel(shape, gpu, row.setup)
    if row.what.startswith("TTFT"):
        return model.ttft(int(row.what.split()[1])) * 1e3
    if row.what.startswith("step"):
        return model.prefill(0, int(row.what.split()[1])).total * 1e3
    context, batch = re.findall(r"\d+", row.what)
    return model.token(int(batch), int(context)) * 1e3


def fit() -> Reach:
    """Least squares of relative errors, by Gauss-Newton steps over the logarithms of what is fitted."""
    used, of_model = [row for row in rows() if row.role == "fit"], shapes()
    heads = sorted(HOPPER.attention)

    def made(values: np.ndarray) -> Reach:
        numbers = np.exp(values).tolist()
        own = dict(zip(FITTED, numbers, strict=False))
        return replace(HOPPER, **own, attention=dict(zip(heads, numbers[len(FITTED) :], strict=True)))

    def errors(values: np.ndarray) -> np.ndarray:
        reach = made(values)
        logs = [np.log(planned_ms(row, of_model[row.model], reach) / row.ms) for row in used]
        return np.array([*logs, *(0.05 * (values - start))])  # what no row tells stays where it was

    start = np.log([*(getattr(HOPPER, name) for name in FITTED), *(HOPPER.attention[n] for n in heads)])
    values = start.copy()
    for _ in range(20):
        now = errors(values)
        slope = np.stack([(errors(values + 1e-4 * one) - now) / 1e-4 for one in np.eye(len(values))], axis=1)
        change = np.linalg.lstsq(slope, -now, rcond=None)[0]
        step = next((s for s in (1.0, 0.5, 0.25, 0.1) if np.sum(errors(values + s * change) ** 2) < np.sum(now**2)), 0)
        values = values + step * change
    return made(values)


def check() -> list[dict[str, Any]]:
    of_model = shapes()
    found = []
    for row in rows():
        planned = planned_ms(row, of_model[row.model])
        found.append({
            "role": row.role, "source": row.source, "model": row.model, "gpus": f"{row.setup.num_ranks} x {row.gpu}",
            "layout": row.setup.step_layout, "kv_cache": "sharded" if row.setup.shards_cache else "replicated",
            "what": row.what, "measured ms": round(row.ms, 3), "planned ms": round(planned, 3),
            "ratio": round(planned / row.ms, 3), "note": row.note,
        })  # fmt: skip
    return found


def check_room() -> list[dict[str, Any]]:
    """Tokens that fit, of all runs that say them. Nothing was fitted to these but the constants of `room.beside`."""
    shape = shapes()["Llama-3.1-8B"]
    runs = [
        ("h100-x2-gpu-memory-pcp1.json", "cache_tokens", "h100", 1, 0.8, Wish(8192, kv_cache="replicated")),
        ("h100-x2-gpu-memory-pcp2.json", "cache_tokens", "h100", 2, 0.8, Wish(8192, kv_cache="replicated")),
        ("h200-x2-llama-3.1-8b-million.json", "tokens that fit", "h200", 2, 0.9, Wish(1_000_048, max_num_seqs=8)),
    ]
    found = []
    for source, field, gpu, num_ranks, utilization, wish in runs:
        measured = _read(source)[field]
        planned = choose(shape, int(KNOWN[gpu].memory * utilization), num_ranks, wish).num_tokens
        found.append({
            "source": source, "gpus": f"{num_ranks} x {gpu}", "measured tokens": measured, "planned tokens": planned,
            "ratio": round(planned / measured, 3),
        })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("check", "fit"))
    parser.add_argument("--output-json", type=Path)
    args = parser.parse_args()
    if args.what == "fit":
        for name, value in asdict(fit()).items():
            print(f"{name}={value if isinstance(value, str | dict) else round(value, 3)}")
        return
    found = check()
    columns = ("role", "gpus", "model", "layout", "kv_cache", "what", "measured ms", "planned ms", "ratio", "note")
    print_table(columns, [[str(row[column]) for column in columns] for row in found])
    for role in ("fit", "judge", "apart"):
        off = [abs(row["ratio"] - 1) for row in found if row["role"] == role]
        within = sum(error <= LIMIT for error in off)
        print(
            f"{role}: {within} of {len(off)} rows within {LIMIT:.0%}; median {np.median(off):.1%}, most {max(off):.1%}"
        )
    room = check_room()
    print_table(list(room[0]), [[str(value) for value in row.values()] for row in room])
    if args.output_json:
        record = {"limit": LIMIT, "times": found, "tokens that fit": room} | environment()
        args.output_json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
