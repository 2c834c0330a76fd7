"""The result of `bench serve`, with the fields of `vllm bench serve`, and how it is printed."""

import math
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np

from twofold.bench.load import Outcome
from twofold.bench.report import print_table

METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}


def summarise(
    outcomes: Sequence[Outcome], duration: float, percentiles: Sequence[float], goals: dict[str, float]
) -> dict[str, Any]:
    """The result, with vLLM's fields."""
    good = [outcome for outcome in outcomes if outcome.success]
    num_in, num_out = sum(one.prompt_len for one in good), sum(one.num_tokens for one in good)
    result: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "total_input_tokens": num_in,
        "total_output_tokens": num_out,
        "total_cached_tokens": sum(one.cached_len or 0 for one in good),
        "prefix_cache_hit_rate": _hit_rate(good),
        "turns": _by_turn(good),
        "request_throughput": len(good) / duration,
        "request_goodput": sum(_keeps(one, goals) for one in good) / duration if goals else None,
        "output_throughput": num_out / duration,
        "total_token_throughput": (num_in + num_out) / duration,
        "max_concurrent_requests": _most_at_once(good),
        "input_lens": [one.prompt_len for one in outcomes],
        "output_lens": [one.num_tokens for one in outcomes],
        "ttfts": [one.ttft for one in outcomes],
        "itls": [one.itl for one in outcomes],
        "start_times": [one.start for one in outcomes],
        "generated_texts": [one.text for one in outcomes],
        "errors": [one.error for one in outcomes],
    }
    values = {
        "ttft": [one.ttft for one in good],
        "tpot": [one.tpot for one in good if one.num_tokens > 1],
        "itl": [gap for one in good for gap in one.itl],
        "e2el": [one.latency for one in good],
    }
    for name, seconds in values.items():
        ms = np.array(seconds or [0.0]) * 1000
        result[f"mean_{name}_ms"] = float(ms.mean())
        result[f"median_{name}_ms"] = float(np.median(ms))
        result[f"std_{name}_ms"] = float(ms.std())
        for percentile in percentiles:
            result[f"p{percentile:g}_{name}_ms"] = float(np.percentile(ms, percentile))
    return result


def _hit_rate(outcomes: Sequence[Outcome]) -> float | None:
    """Cached tokens / tokens of the prompts; None if the server does not tell of cached ones."""
    told = [one for one in outcomes if one.cached_len is not None]
    return sum(one.cached_len or 0 for one in told) / sum(one.prompt_len for one in told) if told else None


def _by_turn(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """What each turn of the conversations took."""
    turns = []
    for turn in sorted({one.turn for one in outcomes}):
        of_turn = [one for one in outcomes if one.turn == turn]
        ttfts = np.array([one.ttft for one in of_turn]) * 1000
        turns.append(
            {
                "turn": turn,
                "completed": len(of_turn),
                "mean_input_tokens": sum(one.prompt_len for one in of_turn) / len(of_turn),
                "prefix_cache_hit_rate": _hit_rate(of_turn),
                "mean_ttft_ms": float(ttfts.mean()),
                "median_ttft_ms": float(np.median(ttfts)),
                "max_ttft_ms": float(ttfts.max()),
            }
        )
    return turns


def _most_at_once(outcomes: Sequence[Outcome]) -> int:
    changes = sorted([(one.start, 1) for one in outcomes] + [(one.start + one.latency, -1) for one in outcomes])
    return int(np.cumsum([change for _, change in changes] or [0]).max())


def _keeps(outcome: Outcome, goals: dict[str, float]) -> bool:
    measured = {"ttft": outcome.ttft, "tpot": outcome.tpot, "e2el": outcome.latency}
    return all(measured[name] * 1000 <= limit for name, limit in goals.items())


def print_result(result: dict[str, Any], args: Namespace, shown: Sequence[str], percentiles: Sequence[float]) -> None:
    def line(name: str, value: Any) -> None:
        print(f"{name + ':':<40} {value:<10.2f}" if isinstance(value, float) else f"{name + ':':<40} {value:<10}")

    print(f"{' Serving Benchmark Result ':=^50}")
    line("Successful requests", result["completed"])
    line("Failed requests", result["failed"])
    if args.max_concurrency is not None:
        line("Maximum request concurrency", args.max_concurrency)
    if args.request_rate < math.inf:
        line("Request rate configured (RPS)", args.request_rate)
    line("Benchmark duration (s)", result["duration"])
    line("Total input tokens", result["total_input_tokens"])
    line("Total generated tokens", result["total_output_tokens"])
    if (hit_rate := result["prefix_cache_hit_rate"]) is not None:
        line("Cached input tokens", result["total_cached_tokens"])
        line("Prefix cache hit rate (%)", 100 * hit_rate)
    line("Request throughput (req/s)", result["request_throughput"])
    if result["request_goodput"] is not None:
        line("Request goodput (req/s)", result["request_goodput"])
    line("Output token throughput (tok/s)", result["output_throughput"])
    line("Peak concurrent requests", result["max_concurrent_requests"])
    line("Total token throughput (tok/s)", result["total_token_throughput"])
    for name in shown:
        print(f"{METRICS[name]:-^50}")
        for how in ("mean", "median", *(f"p{percentile:g}" for percentile in percentiles)):
            line(f"{how.capitalize()} {name.upper()} (ms)", result[f"{how}_{name}_ms"])
    if len(result["turns"]) > 1:
        print(f"{'Time to First Token by Turn':-^50}")
        print_table(
            ("turn", "requests", "input tokens", "hit rate %", "median ms", "max ms"), _turn_cells(result["turns"])
        )
    print("=" * 50)
    for error in sorted({error for error in result["errors"] if error})[:3]:
        print(f"failed: {error}", file=sys.stderr)


def _turn_cells(turns: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            *(str(turn["turn"]), str(turn["completed"]), f"{turn['mean_input_tokens']:.0f}"),
            "" if turn["prefix_cache_hit_rate"] is None else f"{100 * turn['prefix_cache_hit_rate']:.1f}",
            *(f"{turn['median_ttft_ms']:.1f}", f"{turn['max_ttft_ms']:.1f}"),
        ]
        for turn in turns
    ]
