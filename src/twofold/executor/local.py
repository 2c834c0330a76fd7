"""Ranks as processes of this machine, each behind a socket pair. They end when their engine does, however it ends."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import astuple, replace
from pathlib import Path
from typing import TypeVar

from twofold import processes, streams
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
    RankStart,
    SharedFiles,
    Step,
    StepResult,
)
from twofold.errors import ModelError, RankDiedError, RankFailedError
from twofold.interrupts import let_through
from twofold.native.build import start_build
from twofold.processes import no_interrupts

LOOK_SECONDS = 0.5  # between looks at ranks that do not answer
KILLED_SECONDS = 0.05  # after another rank notices a killed rank, until its end is visible here
LOOKS_STOPPED = 4  # looks after which a rank that a signal stopped counts as dead

Answer = TypeVar("Answer", RankReport, Allocated, StepResult, Profiled)


class LocalExecutor:
    """Starts one process a rank and waits until each has loaded the model, `start_timeout` seconds at most.

    Raises:
        ModelError: the model cannot be loaded.
        RankDiedError, RankFailedError: a rank did not come up, or could not be started.

    The ranks end with `shutdown`, with the object, or with this process.
    """

    command = (sys.executable, "-m", "twofold.worker.worker")

    def __init__(self, runtime: RuntimeConfig, start_timeout: float | None = None) -> None:
        self._start_timeout = start_timeout
        streams.reserve_numbers()
        if runtime.attention_backend == "native":
            start_build()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._channels: list[Channel] = []
        self._lifelines: list[int] = []
        self._looks_stopped = [0] * runtime.num_ranks
        self._end = weakref.finalize(self, _end_ranks, os.getpid(), self._processes, self._channels, self._lifelines)
        try:
            with _shared_files() as files:
                for _ in range(runtime.num_ranks):
                    self._start(runtime, files)
            for rank in range(runtime.num_ranks):
                self._post(rank, pack(RankStart(rank, runtime, files)))
            self.reports = self._answers(RankReport, start_timeout)
        except OSError as error:
            self.shutdown()
            raise RankDiedError(f"cannot start {runtime.num_ranks} ranks: {error}") from error
        except BaseException:
            self.shutdown()
            raise

    def _start(self, runtime: RuntimeConfig, files: SharedFiles) -> None:
        with no_interrupts(), contextlib.ExitStack() as stack:  # a rank that is started is known, and ended
            ours, theirs = socket.socketpair()
            self._channels.append(Channel(ours))
            stack.enter_context(theirs)
            process, lifeline = processes.start(
                [*self.command, str(theirs.fileno())],
                environment={"OMP_NUM_THREADS": str(runtime.num_threads)},
                pass_fds=[theirs.fileno(), *astuple(files)],
                stdin=subprocess.DEVNULL,
            )
            self._processes.append(process)
            self._lifelines.append(lifeline)

    @property
    def pids(self) -> list[int]:
        """Process ids, in the order of ranks."""
        return [process.pid for process in self._processes]

    def allocate(self, num_blocks: int, is_sharded: bool, times_layouts: bool) -> str | None:
        self._send(Allocate(num_blocks, is_sharded, times_layouts))
        answers = self._answers(Allocated, self._start_timeout)
        self.reports = [
            replace(report, seconds=answer.seconds) for report, answer in zip(self.reports, answers, strict=True)
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
        self._look_at(range(len(self._processes)))

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
                    raise ModelError(failure.message)
                raise RankFailedError(f"rank {rank} failed: {failure.message}")

    def _raise_killed(self) -> None:
        """Raises if a rank was killed: another rank may fail because of it, and say so first."""
        time.sleep(KILLED_SECONDS)
        for rank, process in enumerate(self._processes):
            if (process.poll() or 0) < 0:
                self._raise_dead(rank)

    def _check_open(self) -> None:
        if not self._channels:
            raise RankDiedError("the ranks of this engine have ended; make a new one")

    def _look_at(self, ranks: Iterable[int]) -> None:
        """Raises if one of the ranks has ended, or stays stopped by a signal: the others would wait for it forever."""
        for rank in ranks:
            process = self._processes[rank]
            if process.poll() is not None:
                self._raise_dead(rank)
            self._looks_stopped[rank] = self._looks_stopped[rank] + 1 if _is_stopped(process.pid) else 0
            if self._looks_stopped[rank] >= LOOKS_STOPPED:
                self._raise_dead(rank, "was stopped by a signal")

    def _raise_dead(self, rank: int, how: str | None = None) -> None:
        if how is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._processes[rank].wait(1.0)
            code = self._processes[rank].returncode
            if code is None:
                how = "stopped answering"
            else:
                how = f"was killed by signal {-code}" if code < 0 else f"exited with {code}"
        self.shutdown()  # the others may wait for that rank in a collective
        raise RankDiedError(f"rank {rank} {how}; all ranks were ended")

    def kill(self) -> None:
        for process in self._processes:
            process.kill()

    def shutdown(self) -> None:
        self._end()


def _end_ranks(
    pid: int, processes: list[subprocess.Popen[bytes]], channels: list[Channel], lifelines: list[int]
) -> None:
    """Ends the ranks that process `pid` has started, and waits for their end."""
    if os.getpid() != pid:  # a fork of it: the ranks are not its own
        return
    for process in processes:
        process.kill()
    for channel in channels:
        channel.close()
    for lifeline in lifelines:
        os.close(lifeline)
    channels.clear()
    lifelines.clear()
    for process in processes:
        process.wait()


@contextlib.contextmanager
def _shared_files() -> Iterator[SharedFiles]:
    """Files in memory for ranks that are started meanwhile. Nobody but them has these files then."""
    with contextlib.ExitStack() as stack:
        files = []
        for name in ("store", "weights", "entries", "sums", "cache"):
            files.append(os.memfd_create(f"twofold-{name}"))
            stack.callback(os.close, files[-1])
        yield SharedFiles(*files)


def _is_stopped(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # it has ended
        return False
    return stat.rpartition(")")[2].split()[0] == "T"
