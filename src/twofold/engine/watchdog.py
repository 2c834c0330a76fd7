"""How long a step may take before its ranks count as hung."""

import numpy as np

from twofold.engine.step import ScheduledBatch

SLACK = 10.0  # a step may be this much slower than any before it
DECAY = 0.98  # of the slowest pace, with each step
STEP_TOKENS = 64.0  # what a step costs besides its tokens, in tokens
PAIRS_PER_TOKEN = 4096.0  # attended pairs that cost as much as a token; more in most models, so this is lenient


class Watchdog:
    """Learns the pace of these ranks on this model; the limit grows with a step's tokens and what they attend to.

    Nothing is known of the first step, which may compile kernels: it has no limit.
    """

    def __init__(self, step_timeout: float) -> None:
        self.step_timeout = step_timeout
        self._slowest: float | None = None  # seconds a token, of late

    def limit(self, batch: ScheduledBatch) -> float | None:
        """Seconds that this step may take."""
        return None if self._slowest is None else self.step_timeout + SLACK * self._slowest * _cost(batch)

    def observe(self, batch: ScheduledBatch, seconds: float) -> None:
        """Takes how long a step took."""
        self._slowest = max((self._slowest or 0.0) * DECAY, seconds / _cost(batch))


def _cost(batch: ScheduledBatch) -> float:
    """A step's work, in tokens."""
    new = batch.num_scheduled_tokens.astype(np.float64)
    pairs = new * batch.num_computed_tokens + new * (new + 1) / 2
    return STEP_TOKENS + float(new.sum()) + float(pairs.sum()) / PAIRS_PER_TOKEN
