"""How long a step may take before its ranks count as hung."""

import numpy as np

from twofold.contract import ScheduledBatch

SLACK = 10.0  # a step may be this much slower than any before it
DECAY = 0.98  # of the slowest pace, with each step
STEP_TOKENS = 64.0  # what a step costs besides its tokens, in tokens
PAIRS_PER_TOKEN = 4096.0  # attended pairs that cost as much as a token; more in most models, so this is lenient
UNKNOWN_PACE = {"cpu": 3e-10, "cuda": 1e-12}  # seconds a token and parameter: at 7 GFLOP/s, at 2 TFLOP/s
START_UP = {"cpu": 0.0, "cuda": 300.0}  # seconds for what new ranks do once: compile kernels


class Watchdog:
    """Learns the pace of these ranks on this model; the limit grows with a step's tokens and what they attend to."""

    def __init__(self, step_timeout: float, device: str, num_parameters: int) -> None:
        self.step_timeout = step_timeout
        self._unknown_pace, self._start_up = UNKNOWN_PACE[device] * num_parameters, START_UP[device]
        self._slowest: float | None = None  # seconds a token, of late
        self._ranks_are_new = True

    def limit(self, batch: ScheduledBatch) -> float:
        """Seconds that this step may take."""
        pace = self._unknown_pace if self._slowest is None else SLACK * self._slowest
        return self.step_timeout + pace * _cost(batch) + (self._start_up if self._ranks_are_new else 0.0)

    def observe(self, batch: ScheduledBatch, seconds: float) -> None:
        """Takes how long a step took."""
        self._slowest = max((self._slowest or 0.0) * DECAY, seconds / _cost(batch))
        self._ranks_are_new = False

    def restart(self) -> None:
        """The ranks are new ones, as fast as those before."""
        self._ranks_are_new = True


def _cost(batch: ScheduledBatch) -> float:
    """A step's work, in tokens."""
    new = batch.num_scheduled_tokens.astype(np.float64)
    pairs = new * batch.num_computed_tokens + new * (new + 1) / 2
    return STEP_TOKENS + float(new.sum()) + float(pairs.sum()) / PAIRS_PER_TOKEN
