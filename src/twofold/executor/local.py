"""Ranks as processes of this machine, each behind a socket pair. They end when their engine does, however it ends.

Told of several nodes, it pretends: ranks of one node share memory, and those of different nodes share nothing.
"""

import contextlib
import os
import socket
import subprocess
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple

from twofold import processes, streams
from twofold.channel import Channel, pack
from twofold.config import RuntimeConfig
from twofold.contract import RankReport, RankStart, SharedFiles
from twofold.errors import RankDiedError
from twofold.executor.channels import ChannelExecutor
from twofold.native.build import start_build
from twofold.processes import is_stopped, no_interrupts

# A rank keeps memory that it frees: pages that the kernel must give anew take longer than what is computed in them.
KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}
LOOKS_STOPPED = 4  # looks after which a rank that a signal stopped counts as dead


class LocalExecutor(ChannelExecutor):
    """Starts one process a rank and waits until each has loaded the model, `start_timeout` seconds at most.

    Raises:
        ModelError: the model cannot be loaded.
        RankDiedError, RankFailedError: a rank did not come up, or could not be started.

    The ranks end with `shutdown`, with the object, or with this process.
    """

    command = (sys.executable, "-m", "twofold.worker")

    def __init__(
        self, runtime: RuntimeConfig, start_timeout: float | None = None, started: "RankProcesses | None" = None
    ) -> None:
        """`started`: the processes, if they were started before the runtime was settled."""
        super().__init__(runtime, start_timeout)
        self._looks_stopped = [0] * runtime.num_ranks
        try:
            self._ranks = started or RankProcesses(
                self.command, runtime.num_ranks, runtime.num_threads, runtime.num_nodes
            )
        except OSError as error:
            raise RankDiedError(f"cannot start {runtime.num_ranks} ranks: {error}") from error
        self._channels, self._processes = self._ranks.channels, self._ranks.processes
        if runtime.attention_backend == "native":
            start_build()
        try:
            for rank, mine in enumerate(self._ranks.files):
                self._post(rank, pack(RankStart(rank, runtime, mine)))
            self.reports = self._answers(RankReport, start_timeout)
        except BaseException:
            self.shutdown()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids, in the order of ranks."""
        return [process.pid for process in self._processes]

    def _look_at(self, ranks: Iterable[int]) -> None:
        """Raises if one of the ranks has ended, or stays stopped by a signal: the others would wait for it forever."""
        for rank in ranks:
            process = self._processes[rank]
            if process.poll() is not None:
                self._raise_dead(rank)
            self._looks_stopped[rank] = self._looks_stopped[rank] + 1 if is_stopped(process.pid) else 0
            if self._looks_stopped[rank] >= LOOKS_STOPPED:
                self._raise_dead(rank, "was stopped by a signal")

    def _exit_code(self, rank: int, timeout: float = 0.0) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._processes[rank].wait(timeout)
        return self._processes[rank].returncode

    def kill(self) -> None:
        for process in self._processes:
            process.kill()

    def shutdown(self) -> None:
        self._ranks.end()


class RankProcesses:
    """The processes of ranks. Each imports what it needs, and then waits for its `RankStart`.

    They end with `end`, with the object, or with this process.

    Raises:
        OSError: one cannot be started. None is left then.
    """

    def __init__(self, command: Sequence[str], num_ranks: int, num_threads: int, num_nodes: int = 1) -> None:
        streams.reserve_numbers()
        self.channels: list[Channel] = []  # in the order of ranks
        self.processes: list[subprocess.Popen[bytes]] = []
        self._lifelines: list[int] = []
        self.end = weakref.finalize(self, _end_ranks, os.getpid(), self.processes, self.channels, self._lifelines)
        environment = {"OMP_NUM_THREADS": str(num_threads)} | KEPT_MEMORY
        try:
            with _shared_files(num_nodes) as of_nodes:
                self.files = [of_nodes[rank * num_nodes // num_ranks] for rank in range(num_ranks)]
                for mine in self.files:
                    self._start(command, environment, mine)
        except BaseException:
            self.end()
            raise

    def _start(self, command: Sequence[str], environment: dict[str, str], files: SharedFiles) -> None:
        with no_interrupts(), contextlib.ExitStack() as stack:  # a rank that is started is known, and ended
            ours, theirs = socket.socketpair()
            self.channels.append(Channel(ours))
            stack.enter_context(theirs)
            process, lifeline = processes.start(
                [*command, str(theirs.fileno())],
                environment=environment,
                pass_fds=[theirs.fileno(), *astuple(files)],
                stdin=subprocess.DEVNULL,
            )
            self.processes.append(process)
            self._lifelines.append(lifeline)


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
def _shared_files(num_nodes: int) -> Iterator[list[SharedFiles]]:
    """Files in memory for the ranks of each node that are started meanwhile. Nobody but them has these files then."""
    with contextlib.ExitStack() as stack:

        def make(name: str) -> int:
            file = os.memfd_create(f"twofold-{name}")
            stack.callback(os.close, file)
            return file

        store = make("store")
        yield [SharedFiles(store, *map(make, ("weights", "entries", "sums", "cache"))) for _ in range(num_nodes)]
