"""Ranks as processes of this machine, each behind a socket pair. They end when their engine does, however it ends.

Told of several nodes, it pretends: ranks of one node share memory, and those of different nodes share nothing.
"""

import contextlib
import os
import socket
import subprocess
import sys
import weakref
from collections.abc import Iterable, Iterator
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

    command = (sys.executable, "-m", "twofold.worker.worker")

    def __init__(self, runtime: RuntimeConfig, start_timeout: float | None = None) -> None:
        super().__init__(runtime, start_timeout)
        streams.reserve_numbers()
        if runtime.attention_backend == "native":
            start_build()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lifelines: list[int] = []
        self._looks_stopped = [0] * runtime.num_ranks
        self._end = weakref.finalize(self, _end_ranks, os.getpid(), self._processes, self._channels, self._lifelines)
        try:
            with _shared_files(runtime.num_nodes) as of_nodes:
                files = [of_nodes[rank // runtime.ranks_per_node] for rank in range(runtime.num_ranks)]
                for mine in files:
                    self._start(runtime, mine)
            for rank, mine in enumerate(files):
                self._post(rank, pack(RankStart(rank, runtime, mine)))
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
                environment={"OMP_NUM_THREADS": str(runtime.num_threads)} | KEPT_MEMORY,
                pass_fds=[theirs.fileno(), *astuple(files)],
                stdin=subprocess.DEVNULL,
            )
            self._processes.append(process)
            self._lifelines.append(lifeline)

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
def _shared_files(num_nodes: int) -> Iterator[list[SharedFiles]]:
    """Files in memory for the ranks of each node that are started meanwhile. Nobody but them has these files then."""
    with contextlib.ExitStack() as stack:

        def make(name: str) -> int:
            file = os.memfd_create(f"twofold-{name}")
            stack.callback(os.close, file)
            return file

        store = make("store")
        yield [SharedFiles(store, *map(make, ("weights", "entries", "sums", "cache"))) for _ in range(num_nodes)]
