"""What executors have in common: ranks behind channels, one a rank, whatever carries the bytes."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

from twofold.channel import Channel, pack, wait
from twofold.config import RuntimeConfig
from twofold.contract import (
    Allocate,
    Allocated,
    Breakdown,
    Failure,
    Masks,
    Profile,
    Profiled,
    RankMessage,
    RankReport,
    Step,
    StepResult,
)
from twofold.errors import ModelError, RankDiedError, RankFailedError
from twofold.interrupts import let_through

LOOK_SECONDS = 0.5  # between looks at ranks that do not answer
KILLED_SECONDS = 0.05  # after another rank notices a killed rank, until its end is visible here
ENDED_SECONDS = 1.0  # after a rank's channel has closed, until it is known how the rank ended

Answer = TypeVar("Answer", RankReport, Allocated, StepResult, Profiled)


class ChannelExecutor(ABC):
    """Sends messages to ranks and collects their answers. A subclass starts the ranks, looks at them and ends them."""

    reports: list[RankReport]

    def __init__(self, runtime: RuntimeConfig, start_timeout: float | None) -> None:
        self.runtime = runtime
        self._start_timeout = start_timeout
        self._channels: list[Channel] = []  # in the order of ranks; none once the ranks have ended

    @abstractmethod
    def _look_at(self, ranks: Iterable[int]) -> None:
        """Calls `_raise_dead` if one of the ranks has ended, or never will answer."""

    @abstractmethod
    def _exit_code(self, rank: int, timeout: float = 0.0) -> int | None:
        """Of a rank that has ended, or ends in so many seconds; minus the signal that killed it; None if not known."""

    @abstractmethod
    def kill(self) -> None: ...

    @abstractmethod
    def shutdown(self) -> None: ...

    def allocate(self, num_blocks: int, is_sharded: bool, times_layouts: bool) -> str | None:
        self._send(Allocate(num_blocks, is_sharded, times_layouts))
        answers = self._answers(Allocated, self._start_timeout)
        self.reports = [
            replace(report, seconds=answer.seconds, memory_bytes=answer.memory_bytes)
            for report, answer in zip(self.reports, answers, strict=True)
        ]
        return answers[0].step_costs

    def submit(self, step: Step) -> None:
        self._send(step)

    def submit_masks(self, masks: Masks) -> None:
        self._send(masks)

    def collect(self, timeout: float | None = None) -> list[StepResult]:
        return self._answers(StepResult, timeout)

    def check(self) -> None:
        self._check_open()
        self._look_at(range(len(self._channels)))

    def profile(self, start: bool) -> list[Breakdown | None]:
        self._send(Profile(start))
        return [answer.breakdown for answer in self._answers(Profiled)]

    def _send(self, message: RankMessage) -> None:
        self._check_open()
        data = pack(message)
        for rank in range(len(self._channels)):
            self._post(rank, data)

    def _post(self, rank: int, data: bytes) -> None:
        try:
            self._channels[rank].post(data)
        except OSError:
            self._raise_dead(rank)

    def _answers(self, kind: type[Answer], timeout: float | None = None) -> list[Answer]:
        """A message of that kind from every rank, taken only when all are there, so that an interrupt loses none.

        The first failure ends the wait, since the others may wait for that rank.
        """
        self._check_open()
        # Looks are counted, since a clock would go on while this process itself is stopped.
        num_looks, look = 0, time.monotonic() + LOOK_SECONDS
        while waiting := [rank for rank, channel in enumerate(self._channels) if channel.find(kind) is None]:
            with let_through():
                wait(self._channels, LOOK_SECONDS)
            self._pump()
            if time.monotonic() < look:
                continue
            num_looks, look = num_looks + 1, time.monotonic() + LOOK_SECONDS
            self._look_at(waiting)
            if timeout is not None and num_looks * LOOK_SECONDS >= timeout:
                self._raise_dead(waiting[0], f"did not answer for {timeout:.0f} s")
        return [channel.take(kind) for channel in self._channels]

    def _pump(self) -> None:
        for rank, channel in enumerate(self._channels):
            try:
                channel.pump()
            except (EOFError, OSError):
                self._raise_dead(rank)
            if (failure := channel.find(Failure)) is not None:
                self._raise_killed()
                self.shutdown()
                if failure.is_model_error:
                    raise ModelError(failure.message, field=failure.field)
                raise RankFailedError(f"rank {rank} failed: {failure.message}")

    def _raise_killed(self) -> None:
        """Raises if a rank was killed: another rank may fail because of it, and say so first."""
        time.sleep(KILLED_SECONDS)
        for rank in range(len(self._channels)):
            if (self._exit_code(rank) or 0) < 0:
                self._raise_dead(rank)

    def _check_open(self) -> None:
        if not self._channels:
            raise RankDiedError("the ranks of this engine have ended; make a new one")

    def _raise_dead(self, rank: int, how: str | None = None) -> None:
        if how is None:
            code = self._exit_code(rank, ENDED_SECONDS)
            if code is None:
                how = "stopped answering"
            else:
                how = f"was killed by signal {-code}" if code < 0 else f"exited with {code}"
        name = self._name(rank)
        self.shutdown()  # the others may wait for that rank in a collective
        raise RankDiedError(f"{name} {how}; all ranks were ended")

    def _name(self, rank: int) -> str:
        return f"rank {rank}"
