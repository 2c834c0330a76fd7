"""What an engine counts, as a script reads it: classes are vLLM's, names are those of the server's /metrics."""

from dataclasses import dataclass
from itertools import accumulate

from twofold.engine.stats import EngineSnapshot, Observations


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    labels: dict[str, str]


@dataclass(frozen=True, slots=True)
class Counter(Metric):
    """A number that only grows."""

    value: float


@dataclass(frozen=True, slots=True)
class Gauge(Metric):
    """A number of this moment."""

    value: float


@dataclass(frozen=True, slots=True)
class Histogram(Metric):
    """How values are spread. `buckets`: a limit as text -> how many values are at most that; "+Inf": all of them."""

    count: int
    sum: float
    buckets: dict[str, int]


@dataclass(frozen=True, slots=True)
class Vector(Metric):
    """Numbers by position in a draft. No metric is one here: there is no speculative decoding. Scripts look for it."""

    values: list[int]


def read_metrics(now: EngineSnapshot, model: str) -> list[Metric]:
    stats, labels = now.stats, {"model_name": model}
    gauges = {
        "num_requests_running": now.num_running,
        "num_requests_waiting": now.num_waiting,
        "kv_cache_usage_perc": now.num_blocks_in_use / now.num_blocks,
        "partition_imbalance": stats.partition_imbalance,
    }
    counters = {
        "num_preemptions": now.num_preemptions,
        "prefix_cache_queries": now.num_prefix_queries,
        "prefix_cache_hits": now.num_prefix_hits,
        "engine_steps": stats.num_steps,
        "engine_step_seconds": stats.step_seconds,
        "computed_tokens": stats.num_tokens,
        "exchange_bytes": stats.exchange_bytes,
        "exchange_node_bytes": stats.node_bytes,
        "exchange_seconds": stats.exchange_seconds,
        "rank_restarts": stats.num_restarts,
    }
    histograms = {
        "time_to_first_token_seconds": stats.first_token_seconds,
        "e2e_request_latency_seconds": stats.request_seconds,
        "request_prompt_tokens": stats.prompt_tokens,
        "request_generation_tokens": stats.output_tokens,
    }
    return [
        *(Gauge(f"twofold:{name}", labels, value) for name, value in gauges.items()),
        *(Counter(f"twofold:{name}", labels, value) for name, value in counters.items()),
        *(_histogram(f"twofold:{name}", labels, seen) for name, seen in histograms.items()),
    ]


def _histogram(name: str, labels: dict[str, str], seen: Observations) -> Histogram:
    up_to = list(accumulate(seen.counts))
    limits = [*(f"{float(limit)}" for limit in seen.limits), "+Inf"]
    return Histogram(name, labels, up_to[-1], seen.sum, dict(zip(limits, up_to, strict=True)))
