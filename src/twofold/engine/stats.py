"""What an engine has done since it started: plain numbers for metrics, written by the thread that steps."""

import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from twofold.contract import ScheduledBatch, StepResult
from twofold.outputs import RequestMetrics

FIRST_TOKEN = (0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
REQUEST = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000)


@dataclass(slots=True)
class Observations:
    """How many of the observed values are at most each of `limits`, which ascend, and their sum."""

    limits: tuple[float, ...]
    sum: float = 0.0
    counts: list[int] = field(default_factory=list)  # values between two limits; the last are above all

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.limits) + 1)

    def take(self, value: float) -> None:
        self.sum += value
        self.counts[bisect_left(self.limits, value)] += 1


@dataclass(slots=True)
class EngineStats:
    num_steps: int = 0
    num_tokens: int = 0  # computed, prompts' and answers'
    step_seconds: float = 0.0
    tokens_per_second: float = 0.0  # of late, of steps that prefill
    exchange_bytes: int = 0  # received by all ranks from others
    node_bytes: int = 0  # those of them that came from other nodes
    exchange_seconds: float = 0.0  # of the rank that spent least: the others waited for it
    partition_imbalance: float = 1.0  # attended pairs, busiest rank over mean, in the last step that prefilled
    num_restarts: int = 0
    restart_seconds: float = 0.0  # the last restart took
    # Of requests that ended by themselves: seconds from arrival to the first token and to the end; tokens.
    first_token_seconds: Observations = field(default_factory=lambda: Observations(FIRST_TOKEN))
    request_seconds: Observations = field(default_factory=lambda: Observations(REQUEST))
    prompt_tokens: Observations = field(default_factory=lambda: Observations(TOKENS))
    output_tokens: Observations = field(default_factory=lambda: Observations(TOKENS))

    def take_step(self, batch: ScheduledBatch, results: Sequence[StepResult], seconds: float | None) -> None:
        """Counts a step; `seconds` are None where an interrupt came in between."""
        num_tokens = int(batch.num_scheduled_tokens.sum())
        self.num_steps += 1
        self.num_tokens += num_tokens
        self.step_seconds += seconds or 0.0
        if num_tokens > len(batch) and seconds is not None:
            rate = num_tokens / max(seconds, 1e-6)
            self.tokens_per_second += (0.3 if self.tokens_per_second else 1.0) * (rate - self.tokens_per_second)
            pairs = [result.num_pairs for result in results]
            self.partition_imbalance = max(pairs) * len(pairs) / sum(pairs)
        self.exchange_bytes += sum(result.exchange_bytes for result in results)
        self.node_bytes += sum(result.node_bytes for result in results)
        self.exchange_seconds += min(result.exchange_seconds for result in results)

    def take_finished(self, metrics: RequestMetrics) -> None:
        """Counts a request that has ended."""
        if metrics.ttft is None or metrics.e2e is None:
            return
        self.first_token_seconds.take(metrics.ttft)
        self.request_seconds.take(metrics.e2e)
        self.prompt_tokens.take(metrics.num_prompt_tokens)
        self.output_tokens.take(metrics.num_output_tokens)

    def take_restart(self, start: float) -> None:
        self.num_restarts += 1
        self.restart_seconds = time.monotonic() - start


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """An engine at one moment."""

    num_running: int  # requests
    num_prefilling: int  # of those that run, without a token of their answer yet
    num_waiting: int
    num_blocks: int  # that requests can hold
    num_blocks_in_use: int
    num_preemptions: int
    num_prefix_queries: int  # tokens looked up in the prefix cache
    num_prefix_hits: int  # and found there
    stats: EngineStats


@dataclass(frozen=True, slots=True)
class Progress:
    """Requests that are not finished, and the sums over all of their answers."""

    num_requests: int
    num_prompt_tokens: int
    num_computed_tokens: int  # of the prompts
    num_output_tokens: int
