"""Ranks in places that Ray gives, on one machine or several.

Ranks and messages are those of `local.py`. What differs is who starts the processes, and that bytes travel over TCP.

    engine ──socket pair── driver (Ray's) ┄┄┄ Ray ┄┄┄ actor of a place ──lifeline── rank
       └──────────────────────────── TCP: channel (to the rank), link (to the actor) ──┘
"""

import contextlib
import importlib.util
import logging
import os
import secrets
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import twofold
from twofold import processes, streams
from twofold.channel import Channel, pack, wait
from twofold.config import RuntimeConfig
from twofold.contract import RankReport, RankStart
from twofold.errors import ConfigError, RankDiedError, UnavailableError
from twofold.executor.base import Waits
from twofold.executor.channels import LOOK_SECONDS, ChannelExecutor
from twofold.executor.links import CHANNEL, LINK, has_gone, open_door, read_exit_code
from twofold.executor.places import (
    START_SECONDS,
    AskPlaces,
    Given,
    Refused,
    Started,
    StartRanks,
    Waiting,
    check_versions,
    count_nodes,
    environments,
)
from twofold.interrupts import let_through
from twofold.processes import no_interrupts

JOIN_SECONDS = 5.0  # that it may take to join a cluster, before it is told that the engine waits for one
RETRY_SECONDS = 1.0  # between tries to reach a cluster that was lost
TELL_SECONDS = 30.0  # between words in the log while Ray has no places
END_SECONDS = 5.0  # in which Ray's driver gives the places back; then it is killed, and Ray takes them back
NO_REPORTS = {"RAY_USAGE_STATS_ENABLED": "0"}
# Of a cluster that we start for ranks of this machine: it listens on loopback, and asks for a token.
ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}

logger = logging.getLogger(__name__)


def check_installed() -> None:
    """Raises a ConfigError if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "distributed_executor_backend='ray' needs Ray, which is not installed; pip install '.[ray]' in Twofold's "
            "checkout, or use 'mp' for ranks on this machine",
            field="distributed_executor_backend",
        )


class RayExecutor(ChannelExecutor):
    """Waits for places, starts a rank in each, and waits until all have loaded the model.

    Ray has `placement_timeout` seconds to give places, and ranks have `start_timeout` seconds to load the model. Ranks
    that replace others are fewer, `min_ranks` at least, if Ray has not enough places by then.

    Raises:
        ConfigError: there is no cluster, at the first start; nodes have different numbers of ranks or versions.
        ModelError: the model cannot be loaded.
        UnavailableError: Ray gave no places in time.
        RankDiedError, RankFailedError: a rank did not come up.

    The ranks end with `shutdown`, with the object, with this process, and when their node cannot reach it any more.
    """

    def __init__(self, runtime: RuntimeConfig, waits: Waits, start_timeout: float | None = None) -> None:
        super().__init__(runtime, start_timeout)
        streams.reserve_numbers()
        self._waits = waits
        self._links: list[socket.socket] = []
        self._drivers: list[_Driver] = []  # the one that has the ranks' places, once it is started
        self._exit_codes: dict[int, int | None] = {}
        self._end = weakref.finalize(self, _end_all, os.getpid(), self._channels, self._links, self._drivers)
        try:
            given = self._wait_for_places(runtime)
            self._hosts = [place.host for place in given.places]
            self.runtime = _placed(runtime, given)
            self._start(self._drivers[0], given)
            self.reports = self._answers(RankReport, start_timeout)
        except OSError as error:
            self.shutdown()
            raise RankDiedError(f"cannot start {runtime.num_ranks} ranks: {error}") from error
        except BaseException:
            self.shutdown()
            raise

    def _wait_for_places(self, runtime: RuntimeConfig) -> Given:
        num_ranks, timeout = runtime.num_ranks, runtime.engine.placement_timeout
        fewest = num_ranks if self._start_timeout is None else runtime.engine.min_ranks or num_ranks
        start, reason, told = time.monotonic(), "", -TELL_SECONDS
        fewer_from = start + timeout
        end = fewer_from + (START_SECONDS if fewest < num_ranks else 0.0)
        try:
            while time.monotonic() < end:
                if not self._drivers:
                    seconds = fewer_from - time.monotonic()
                    ask = AskPlaces(_address(), num_ranks, runtime.device == "cuda", fewest, seconds)
                    self._drivers.append(_Driver(ask))
                answer = self._drivers[0].receive(LOOK_SECONDS)
                if isinstance(answer, Given):
                    return answer
                if isinstance(answer, Refused):
                    self._drivers.pop().end(0.0)
                    self._check_refused(answer)
                    time.sleep(RETRY_SECONDS)
                if isinstance(answer, Refused | Waiting):
                    reason = answer.reason
                elif time.monotonic() > start + JOIN_SECONDS:
                    reason = reason or "the cluster does not answer"
                self._waits.reason = reason or None
                if reason and time.monotonic() > told + TELL_SECONDS:
                    told = time.monotonic()
                    then = f", then with {fewest} ranks or more" if fewest < num_ranks else ""
                    logger.warning(
                        "waiting for places from Ray, %.0f s at most%s: %s", max(0.0, fewer_from - told), then, reason
                    )
        finally:
            self._waits.reason = None
            self._waits.seconds += time.monotonic() - start
        raise UnavailableError(
            f"Ray gave no places within placement_timeout={timeout:g} s: {reason}; start more nodes, or wait longer"
        )

    def _check_refused(self, refused: Refused) -> None:
        """Raises, unless a cluster that was there is out of reach: it may come back."""
        if not refused.is_unreachable:
            raise RankDiedError(f"Ray did not place the ranks: {refused.reason}")
        if self._start_timeout is None:
            raise ConfigError(refused.reason, field="distributed_executor_backend")

    def _start(self, driver: "_Driver", given: Given) -> None:
        """Has a process started in each place, and connects to all of them."""
        runtime, is_here = self.runtime, all(place.node_id == given.node_id for place in given.places)
        token, limit = secrets.token_bytes(32), time.monotonic() + 2 * START_SECONDS
        started: Started | None = None
        with open_door("127.0.0.1" if is_here else given.host, runtime.num_ranks, token) as door:
            environment = environments(given.places, runtime.num_threads)
            kernels = runtime.attention_backend == "native"
            driver.send(StartRanks(door.address, token, runtime.num_nodes, environment, kernels))
            while started is None or not door.are_all_there:
                with let_through():
                    answer = driver.receive(0.05)
                if isinstance(answer, Started):
                    started = answer
                elif answer is not None or time.monotonic() > limit:
                    reason = answer.reason if isinstance(answer, Refused) else "their processes did not begin"
                    raise RankDiedError(f"Ray did not start the ranks: {reason}")
            self._channels += [Channel(sock) for sock in door.take(CHANNEL)]
            self._links += door.take(LINK)
        for rank, (files, store) in enumerate(zip(started.files, started.stores, strict=True)):
            self._post(rank, pack(RankStart(rank, runtime, files, store)))

    def _look_at(self, ranks: Iterable[int]) -> None:
        for rank in ranks:
            if has_gone(self._links[rank]):
                self._raise_dead(rank)
        if self._drivers[0].has_ended:
            self.shutdown()
            raise RankDiedError("Ray's cluster was lost, and the ranks' places with it; all ranks were ended")

    def _exit_code(self, rank: int, timeout: float = 0.0) -> int | None:
        if rank not in self._exit_codes and has_gone(self._links[rank], timeout):
            self._exit_codes[rank] = read_exit_code(self._links[rank])
        return self._exit_codes.get(rank)

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}"

    def kill(self) -> None:
        for link in self._links:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)  # its place ends the rank, wherever that waits
        for channel in self._channels:
            channel.shutdown()

    def shutdown(self) -> None:
        self._end()


class _Driver:
    """Ray's driver: a process that gives back what Ray gave, and ends, when this one ends in any way."""

    def __init__(self, ask: AskPlaces) -> None:
        folder = Path(twofold.__file__).parents[1]  # Ray's workers import from a driver's working directory, too
        with no_interrupts():
            ours, theirs = socket.socketpair()
            self._channel = Channel(ours)
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "twofold.executor.ray_driver", str(theirs.fileno())],
                    env=os.environ | processes.module_paths() | NO_REPORTS | ({} if ask.address else ALONE),
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=sys.__stderr__ or subprocess.DEVNULL,
                    cwd=folder,
                )
        self.send(ask)

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def send(self, message: AskPlaces | StartRanks) -> None:
        with contextlib.suppress(OSError):  # `receive` says that it has gone
            self._channel.post(pack(message))

    def receive(self, timeout: float) -> Waiting | Given | Started | Refused | None:
        """Its next message; None if there was none in so many seconds."""
        with let_through():
            wait([self._channel], timeout)
        try:
            self._channel.pump()
        except (EOFError, OSError):
            return Refused("Ray's driver has ended, because its cluster was lost", is_unreachable=True)
        answer: Waiting | Given | Started | Refused | None = self._channel.take_any()
        return answer

    def end(self, timeout: float) -> None:
        """Has it give back what Ray gave, in so many seconds, and ends it."""
        self._channel.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        self._process.kill()
        self._process.wait()


def _end_all(pid: int, channels: list[Channel], links: list[socket.socket], drivers: list[_Driver]) -> None:
    """Ends the ranks that process `pid` has started: at once, as far as their machines can be reached."""
    if os.getpid() != pid:
        return
    for link in links:
        link.close()
    for channel in channels:
        channel.close()
    links.clear()
    channels.clear()
    while drivers:
        drivers.pop().end(END_SECONDS)


def _address() -> str | None:
    """Of the cluster to join: the one that this process has joined already, or RAY_ADDRESS."""
    if (ray := sys.modules.get("ray")) is not None and ray.is_initialized():
        return str(ray.get_runtime_context().gcs_address)
    return os.environ.get("RAY_ADDRESS") or None


def _placed(runtime: RuntimeConfig, given: Given) -> RuntimeConfig:
    """The configuration with what depends on the places."""
    check_versions(given.places, twofold.__version__)
    num_nodes, num_ranks = count_nodes(given.places), len(given.places)
    if num_ranks < runtime.num_ranks:
        logger.warning("%d of %d ranks go on: Ray has no more places", num_ranks, runtime.num_ranks)
        runtime = replace(runtime, engine=replace(runtime.engine, prefill_context_parallel_size=num_ranks))
        if num_ranks == 1:
            runtime = replace(runtime, kv_cache="replicated", weights="replicated")
    num_threads = runtime.num_threads
    if not os.environ.get("OMP_NUM_THREADS"):
        fewest = min(place.num_cores for place in given.places)
        num_threads = max(1, fewest * num_nodes // runtime.num_ranks)
    return replace(runtime, num_nodes=num_nodes, num_threads=num_threads)
