"""Ranks as processes of this machine, each behind a socket pair. They end when their engine does, however it ends."""

import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

from twofold.config import RuntimeConfig
from twofold.contract import Breakdown, Failure, Profile, RankReport, RankStart, Step, StepResult
from twofold.errors import ModelError, RankDiedError, RankFailedError

SHUTDOWN_SECONDS = 5.0
LOOK_SECONDS = 0.5  # between looks at ranks that do not answer
LOOKS_STOPPED = 4  # after so many a rank that someone stopped counts as dead
SEND_SECONDS = 30  # that a rank may leave a message unread which the socket cannot hold


class LocalExecutor:
    """Starts one process a rank and waits until each has loaded the model, `start_timeout` seconds at most.

    Raises:
        ModelError: the model cannot be loaded.
        RankDiedError, RankFailedError: a rank did not come up.
    """

    command = (sys.executable, "-m", "twofold.worker.worker")

    def __init__(self, runtime: RuntimeConfig, start_timeout: float | None = None) -> None:
        self._start_timeout = start_timeout
        self._folder = tempfile.mkdtemp(prefix="twofold-")  # of the collective store, shared weights and rows
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[connection.Connection[Any, Any]] = []
        self._lifelines: list[int] = []
        self._looks_stopped = [0] * runtime.num_ranks
        self.reports: list[RankReport] = []
        try:
            for rank in range(runtime.num_ranks):
                self._start(rank, runtime)
            for rank, conn in enumerate(self._connections):
                conn.send(RankStart(rank=rank, runtime=runtime))
            self.reports = self._receive(start_timeout)
        except BaseException:
            self._kill()  # ranks that still import PyTorch hear of nothing else
            raise

    def _start(self, rank: int, runtime: RuntimeConfig) -> None:
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_SECONDS, 0))
        life_read, life_write = os.pipe()  # the write end closes when this process ends, and the rank sees it
        environment = os.environ | {"OMP_NUM_THREADS": str(runtime.num_threads)}
        with theirs, _no_interrupts():
            process = subprocess.Popen(
                [*self.command, str(theirs.fileno()), str(life_read), self._folder],
                pass_fds=[theirs.fileno(), life_read],
                env=environment,
                stdin=subprocess.DEVNULL,
            )
        os.close(life_read)
        self._processes.append(process)
        self._lifelines.append(life_write)
        self._connections.append(connection.Connection(ours.detach()))

    @property
    def pids(self) -> list[int]:
        """Process ids, in the order of ranks."""
        return [process.pid for process in self._processes]

    def allocate(self, num_blocks: int) -> None:
        self._send(num_blocks)
        self.reports = [
            replace(report, seconds=seconds)
            for report, seconds in zip(self.reports, self._receive(self._start_timeout), strict=True)
        ]

    def submit(self, step: Step) -> None:
        self._send(step)

    def collect(self, timeout: float | None = None) -> list[StepResult]:
        return self._receive(timeout)

    def check(self) -> None:
        self._look_at(range(len(self._processes)))

    def profile(self, start: bool) -> list[Breakdown | None]:
        """Starts noting what kernels run on every rank, or stops; → each rank's breakdown then."""
        self._send(Profile(start))
        return self._receive()

    def _send(self, message: Any) -> None:
        self._check_open()
        for rank, conn in enumerate(self._connections):
            try:
                conn.send(message)
            except OSError:
                self._raise_dead(rank)

    def _receive(self, timeout: float | None = None) -> list[Any]:
        """One message from every rank; the first failure ends the wait, since the others may wait for that rank."""
        self._check_open()
        num_looks = 0  # not a clock: it must not run while this process is stopped itself
        answers: list[Any] = [None] * len(self._connections)
        waiting = dict(zip(self._connections, range(len(self._connections)), strict=True))
        while waiting:
            ready = connection.wait(list(waiting), LOOK_SECONDS)
            if not ready:
                num_looks += 1
                self._look_at(waiting.values())
                if timeout is not None and num_looks * LOOK_SECONDS >= timeout:
                    self._raise_dead(min(waiting.values()), f"did not answer for {timeout:.0f} s")
            for conn in ready:
                rank = waiting.pop(conn)  # type: ignore[call-overload]
                try:
                    answers[rank] = self._connections[rank].recv()
                except (EOFError, OSError):
                    self._raise_dead(rank)
                if isinstance(answers[rank], Failure):
                    failure = answers[rank]
                    self._kill()
                    if failure.is_model_error:
                        raise ModelError(failure.message)
                    raise RankFailedError(f"rank {rank} failed: {failure.message}")
        return answers

    def _check_open(self) -> None:
        if not self._connections:
            raise RankDiedError("the ranks of this engine have ended; make a new one")

    def _look_at(self, ranks: Iterable[int]) -> None:
        """Raises if one of the ranks has ended, or is stopped for good: it would hold up the others without an end."""
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
        self._kill()
        raise RankDiedError(f"rank {rank} {how}; all ranks were ended")

    def _kill(self) -> None:
        """Ends ranks of which one has failed: the others may wait for it in a collective."""
        self.kill()
        self.shutdown()

    def kill(self) -> None:
        for process in self._processes:
            process.kill()

    def shutdown(self) -> None:
        for conn in self._connections:
            conn.close()
        for lifeline in self._lifelines:
            os.close(lifeline)
        self._connections, self._lifelines = [], []
        for process in self._processes:
            try:
                process.wait(SHUTDOWN_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Holds Ctrl-C back. A process started meanwhile never gets it: it is for the engine, which ends the ranks."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _is_stopped(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # it has ended, or this is no Linux
        return False
    return stat.rpartition(")")[2].split()[0] == "T"
