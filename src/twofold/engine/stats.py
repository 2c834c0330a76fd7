"""What an engine has done since it started: plain numbers for metrics, written by the thread that steps."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from twofold.contract import ScheduledBatch, StepResult


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
