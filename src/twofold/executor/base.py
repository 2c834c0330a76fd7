"""How the engine reaches its ranks. It schedules; they compute."""

from dataclasses import dataclass
from typing import Protocol

from twofold.config import RuntimeConfig
from twofold.contract import Breakdown, Masks, RankReport, Step, StepResult


class Executor(Protocol):
    """The ranks of one engine. Steps are carried out in the order of `submit`, results come in the same order."""

    runtime: RuntimeConfig  # that the ranks have: there may be fewer ranks than were asked for
    reports: list[RankReport]  # in the order of ranks

    def allocate(self, num_blocks: int, is_sharded: bool, times_layouts: bool) -> str | None:
        """Gives the ranks a cache of this many blocks, each all of it or a share; after it the ranks take steps.

        If it `times_layouts`, → JSON of `StepCosts`.
        """

    def submit(self, step: Step) -> None:
        """Sends a step to every rank and returns at once."""

    def submit_masks(self, masks: Masks) -> None:
        """Sends what the step that was submitted last waits for, and returns at once."""

    def collect(self, timeout: float | None = None) -> list[StepResult]:
        """Waits for the oldest submitted step: every rank's answer, in the order of ranks.

        Raises:
            RankDiedError: a rank ended, or did not answer for `timeout` seconds.
            RankFailedError: a rank raised.
        """

    def check(self) -> None:
        """Checks ranks that have nothing to do.

        Raises:
            RankDiedError: a rank ended.
        """

    def profile(self, start: bool) -> list[Breakdown | None]:
        """Starts timing the kernels of every rank, or stops and returns each rank's breakdown.

        No step may be in flight.
        """

    def kill(self) -> None:
        """Ends all ranks at once. Any thread may call it; a `collect` that waits in another thread raises."""

    def shutdown(self) -> None:
        """Ends all ranks; may be called at any time, more than once."""


@dataclass(slots=True)
class Waits:
    """What starting ranks waits for, where others decide when they may start. Any thread may read it."""

    reason: str | None = None  # now
    seconds: float = 0.0  # in all


class MakeExecutor(Protocol):
    """Starts the ranks of an engine: at first, and again when they were lost."""

    def __call__(self, start_timeout: float | None) -> Executor:
        """Ranks that have loaded the model, within `start_timeout` seconds if that is given.

        Raises:
            ModelError: the model cannot be loaded.
            RankDiedError, RankFailedError: a rank did not come up.
            UnavailableError: there is no place for them, and waiting longer is in vain.
        """
