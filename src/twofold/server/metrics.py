"""Metrics for /metrics: vLLM's names with the prefix `twofold:`, and Twofold's own."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from twofold.engine.async_engine import AsyncEngine, Part, State
from twofold.engine.stats import FIRST_TOKEN, REQUEST, TOKENS
from twofold.outputs import RequestOutput

BETWEEN_TOKENS = (0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 10, 40, 80)

disable_created_metrics()  # they add a gauge to every counter, which no dashboard uses


class Metrics:
    """Counts outputs as the engine's thread passes them on, and reads the engine's state when /metrics is requested."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._labels = {"model_name": model_name}
        counter, histogram = self._counter, self._histogram
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that got their first token.")
        self.generation_tokens = counter("generation_tokens", "Generated tokens.")
        self.request_success = Counter(
            "twofold:request_success",
            "Finished answers, by reason.",
            ("model_name", "finished_reason"),
            registry=self.registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self.request_success.labels(**self._labels, finished_reason=reason)
        self.first_token = histogram(
            "time_to_first_token_seconds", "Seconds from arrival to the first token.", FIRST_TOKEN
        )
        self.between_tokens = histogram("inter_token_latency_seconds", "Seconds between tokens.", BETWEEN_TOKENS)
        self.e2e = histogram("e2e_request_latency_seconds", "Seconds from arrival to the end of a request.", REQUEST)
        self.per_token = histogram(
            "request_time_per_output_token_seconds", "Mean seconds per token after the first.", BETWEEN_TOKENS
        )
        self.request_prompt_tokens = histogram("request_prompt_tokens", "Tokens in a prompt.", TOKENS)
        self.request_generation_tokens = histogram("request_generation_tokens", "Tokens in an answer.", TOKENS)

    def _counter(self, name: str, text: str) -> Counter:
        family = Counter(f"twofold:{name}", text, tuple(self._labels), registry=self.registry)
        return family.labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        family = Histogram(f"twofold:{name}", text, tuple(self._labels), registry=self.registry, buckets=buckets)
        return family.labels(**self._labels)

    def observe(self, part: Part, output: RequestOutput) -> None:
        """Counts a delta. Called in the engine's thread."""
        now = time.monotonic()
        num_new = sum(len(completion.token_ids) for completion in output.outputs)
        self.generation_tokens.inc(num_new)
        part.num_output_tokens += num_new
        if part.last_token_time is not None:
            for _ in range(num_new):
                self.between_tokens.observe(now - part.last_token_time)
        elif num_new:
            part.first_token_time = now
            self.first_token.observe(now - part.answer.arrival_time)
            self.prompt_tokens.inc(len(part.token_ids))
            self.request_prompt_tokens.observe(len(part.token_ids))
        part.last_token_time = now
        if output.finished:
            self._finish(part, output, now)

    def _finish(self, part: Part, output: RequestOutput, now: float) -> None:
        reasons = {completion.finish_reason for completion in output.outputs}
        for completion in output.outputs:
            self.request_success.labels(**self._labels, finished_reason=completion.finish_reason).inc()
        if part.first_token_time is None or reasons & {"abort", "error"}:
            return
        self.e2e.observe(now - part.answer.arrival_time)
        self.request_generation_tokens.observe(part.num_output_tokens)
        if (num_after := part.num_output_tokens // len(output.outputs) - 1) > 0:
            self.per_token.observe((now - part.first_token_time) / num_after)

    def watch(self, engine: AsyncEngine) -> None:
        """Has /metrics show the state of this engine, too."""
        self.registry.register(_State(engine, self._labels))

    def text(self) -> bytes:
        """All metrics in Prometheus' format."""
        text: bytes = generate_latest(self.registry)
        return text


class _State(Collector):  # type: ignore[misc]
    """Reads an engine's state when /metrics is requested."""

    def __init__(self, engine: AsyncEngine, labels: dict[str, str]) -> None:
        self._engine, self._names, self._values = engine, list(labels), list(labels.values())

    def collect(self) -> Iterator[Metric]:
        gauge, counter, state = self._gauge, self._counter, self._engine.state
        now = self._engine.snapshot()
        stats, usage = now.stats, now.num_blocks_in_use / now.num_blocks
        yield gauge("num_requests_running", "Requests that run.", now.num_running)
        yield gauge("num_requests_waiting", "Requests that wait to run.", now.num_waiting)
        yield gauge("kv_cache_usage_perc", "Share of KV cache blocks in use, 0 to 1.", usage)
        yield gauge("num_kv_blocks_in_use", "KV cache blocks that running requests hold.", now.num_blocks_in_use)
        yield gauge("engine_up", "1 while the engine runs.", state is State.RUNNING)
        yield gauge("engine_recovering", "1 while new ranks start.", state is State.RECOVERING)
        yield counter("num_preemptions", "Requests that had to give their blocks back.", now.num_preemptions)
        yield counter("prefix_cache_queries", "Tokens looked up in the prefix cache.", now.num_prefix_queries)
        yield counter("prefix_cache_hits", "Tokens found in the prefix cache.", now.num_prefix_hits)
        yield counter("engine_steps", "Steps of all ranks.", stats.num_steps)
        yield counter("engine_step_seconds", "Seconds in steps.", stats.step_seconds)
        yield counter("computed_tokens", "Computed tokens of prompts and answers.", stats.num_tokens)
        yield counter("exchange_bytes", "Bytes of KV entries received from other ranks.", stats.exchange_bytes)
        yield counter("exchange_node_bytes", "Those of them from ranks of other nodes.", stats.node_bytes)
        yield counter("exchange_seconds", "Seconds of the exchange that nothing hid (CPU).", stats.exchange_seconds)
        yield gauge("partition_imbalance", "Attended pairs, busiest rank over mean.", stats.partition_imbalance)
        yield counter("rank_restarts", "Times that lost ranks were replaced.", stats.num_restarts)
        yield gauge("last_restart_seconds", "Seconds that the last restart took.", stats.restart_seconds)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"twofold:{name}", text, labels=self._names)
        family.add_metric(self._values, float(value))
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"twofold:{name}", text, labels=self._names)
        family.add_metric(self._values, float(value))
        return family
