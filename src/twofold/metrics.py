"""What an engine counts, as a script reads it: names are those of the server's /metrics."""

from dataclasses import dataclass

from twofold.engine.stats import EngineSnapshot


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    value: float


class Counter(Metric):
    """A number that only grows."""


class Gauge(Metric):
    """A number of this moment."""


def read_metrics(now: EngineSnapshot) -> list[Metric]:
    stats = now.stats
    return [
        Gauge("twofold:num_requests_running", now.num_running),
        Gauge("twofold:num_requests_waiting", now.num_waiting),
        Gauge("twofold:kv_cache_usage_perc", now.num_blocks_in_use / now.num_blocks),
        Gauge("twofold:partition_imbalance", stats.partition_imbalance),
        Counter("twofold:num_preemptions", now.num_preemptions),
        Counter("twofold:prefix_cache_queries", now.num_prefix_queries),
        Counter("twofold:prefix_cache_hits", now.num_prefix_hits),
        Counter("twofold:engine_steps", stats.num_steps),
        Counter("twofold:engine_step_seconds", stats.step_seconds),
        Counter("twofold:computed_tokens", stats.num_tokens),
        Counter("twofold:exchange_bytes", stats.exchange_bytes),
        Counter("twofold:exchange_node_bytes", stats.node_bytes),
        Counter("twofold:exchange_seconds", stats.exchange_seconds),
        Counter("twofold:rank_restarts", stats.num_restarts),
    ]
