"""Ranks as processes of this machine, each behind a socket pair. They end when their engine does, however it ends."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from multiprocessing import connection
from typing import Any

from twofold.engine.step import Step, StepResult
from twofold.errors import ModelError, RankDiedError, RankFailedError
from twofold.executor.base import RankReport
from twofold.runtime import RuntimeConfig
from twofold.worker.messages import Failure, RankStart

SHUTDOWN_SECONDS = 5.0


class LocalExecutor:
    """Starts one process a rank and waits until each has loaded the model.

    Raises:
        ModelError: the model cannot be loaded.
        RankDiedError, RankFailedError: a rank did not come up.
    """

    def __init__(self, runtime: RuntimeConfig) -> None:
        self._folder = tempfile.mkdtemp(prefix="twofold-")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[connection.Connection[Any, Any]] = []
        self._lifelines: list[int] = []
        self.reports: list[RankReport] = []
        try:
            for rank in range(runtime.num_ranks):
                self._start(rank, runtime)
            for rank, conn in enumerate(self._connections):
                conn.send(RankStart(rank=rank, runtime=runtime, folder=self._folder))
            self.reports = self._receive()
        except BaseException:
            self.shutdown()
            raise

    def _start(self, rank: int, runtime: RuntimeConfig) -> None:
        ours, theirs = socket.socketpair()
        life_read, life_write = os.pipe()  # the write end closes when this process ends, and the rank sees it
        environment = os.environ | {"OMP_NUM_THREADS": str(runtime.num_threads)}
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "twofold.worker.worker", str(theirs.fileno()), str(life_read)],
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
        self._receive()

    def submit(self, step: Step) -> None:
        self._send(step)

    def collect(self) -> list[StepResult]:
        return self._receive()

    def _send(self, message: Any) -> None:
        for rank, conn in enumerate(self._connections):
            try:
                conn.send(message)
            except OSError:
                self._raise_dead(rank)

    def _receive(self) -> list[Any]:
        """One message from every rank; the first failure ends the wait, since the others may wait for that rank."""
        answers: list[Any] = [None] * len(self._connections)
        waiting = dict(zip(self._connections, range(len(self._connections)), strict=True))
        while waiting:
            for conn in connection.wait(list(waiting)):
                rank = waiting.pop(conn)  # type: ignore[arg-type]
                try:
                    answers[rank] = self._connections[rank].recv()
                except (EOFError, OSError):
                    self._raise_dead(rank)
                if isinstance(answers[rank], Failure):
                    failure = answers[rank]
                    self.shutdown()
                    if failure.is_model_error:
                        raise ModelError(failure.message)
                    raise RankFailedError(f"rank {rank} failed: {failure.message}")
        return answers

    def _raise_dead(self, rank: int) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._processes[rank].wait(1.0)
        code = self._processes[rank].returncode
        how = "stopped answering" if code is None else f"was killed by signal {-code}" if code < 0 else f"exited with {code}"
        self.shutdown()
        raise RankDiedError(f"rank {rank} {how}; the engine has ended its other ranks and must be made anew")

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


