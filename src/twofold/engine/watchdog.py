"""Decide how long a step may take before its ranks count as hung."""

import numpy as np

from twofold.contract import ScheduledBatch

SLACK = 10.0  # a step may be this many times slower than recent ones
DECAY = 0.98  # factor for the slowest known pace, after each step
STEP_TOKENS = 64.0  # fixed cost of a step, in tokens
PAIRS_PER_TOKEN = 4096.0  # attended pairs that cost as much as a token; most models need more
UNKNOWN_PACE = {"cpu": 3e-10, "cuda": 1e-12}  # seconds per token and parameter: 7 GFLOP/s, 2 TFLOP/s
START_UP = {"cpu": 0.0, "cuda": 300.0}  # seconds that new ranks may need in their first step, to compile kernels


class Watchdog:
    """Learns how fast ranks compute the model. The limit grows with the tokens of a step and their attended pairs."""

    def __init__(self, step_timeout: float, device: str, num_parameters: int) -> None:
        self.step_timeout = step_timeout
        self._unknown_pace, self._start_up = UNKNOWN_PACE[device] * num_parameters, START_UP[device]
        self._slowest: float | None = None  # seconds per token, of recent steps
        self._ranks_are_new = True

    def limit(self, batch: ScheduledBatch) -> float:
        """Seconds that a step may take."""
        pace = self._unknown_pace if self._slowest is None else SLACK * self._slowest
        return self.step_timeout + pace * _cost(batch) + (self._start_up if self._ranks_are_new else 0.0)

    def observe(self, batch: ScheduledBatch, seconds: float) -> None:
        """Learns from a step that took `seconds`."""
        self._slowest = max((self._slowest or 0.0) * DECAY, seconds / _cost(batch))
        self._ranks_are_new = False

    def restart(self) -> None:
        """The ranks were replaced. The new ones are as fast, after their first step."""
        self._ranks_are_new = True


def _cost(batch: ScheduledBatch) -> float:
    """The cost of a step, in tokens."""
    new = batch.num_scheduled_tokens.astype(np.float64)
    pairs = new * batch.num_computed_tokens + new * (new + 1) / 2
    return STEP_TOKENS + float(new.sum()) + float(pairs.sum()) / PAIRS_PER_TOKEN
