"""Two machines for tests of Ray: network namespaces of this one with a link between them, and a Ray node in each.

Where namespaces cannot be made, they are two Ray nodes on loopback, and there is no link that could be cut. (Not at
127.0.0.1, for which Ray takes another address of the machine.)
"""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

CLONE_NEWNET = 0x40000000
SOURCE = Path(__file__).parents[1] / "src"
PORT = 6379
MARK = "TWOFOLD_TEST_MACHINE"  # in the environment of all that Ray runs on a machine
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "t" * 64,
    # A node that does not answer is lost after 9 s, not after 25: tests cut a link for 5 s, and for ever.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "8",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",  # after which a driver and a node end, if the head is lost
}


class Machines:
    """Machine 0 has Ray's head, and tests run there (`inside`). `addresses` are those of the machines now."""

    def __init__(
        self,
        name: str = "twofold",
        *,
        with_namespaces: bool | None = None,
        mtu: int = 9000,
        flags: Sequence[str] = ("--num-cpus=1",),
        own: Sequence[Mapping[str, str]] = ({}, {}),
    ) -> None:
        """`flags` of `ray start` say how many ranks there is a place for; `own` is each machine's own environment."""
        self.name, self.mtu, self.flags, self.own = name, mtu, flags, own
        self.has_link = can_make_namespaces() if with_namespaces is None else with_namespaces
        self.addresses = ["10.91.0.1", "10.91.0.2"] if self.has_link else ["127.0.0.2", "127.0.0.3"]
        self.folder = Path(tempfile.mkdtemp(prefix="tfray", dir="/tmp"))  # Ray's sockets need a short path

    @cached_property
    def environment(self) -> dict[str, str]:
        paths = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
        return os.environ | SETTINGS | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}

    @property
    def ray_address(self) -> str:
        return f"{self.addresses[0]}:{PORT}"

    def start(self) -> None:
        if self.has_link:
            for i in range(2):
                run("ip", "netns", "add", f"{self.name}{i}")
            run("ip", "link", "add", self.device(0), "type", "veth", "peer", "name", self.device(1))
            for i, address in enumerate(self.addresses):
                run("ip", "link", "set", self.device(i), "netns", f"{self.name}{i}")
                self.ip(i, "link", "set", "lo", "up")
                self.ip(i, "addr", "add", f"{address}/24", "dev", self.device(i))
                self.ip(i, "link", "set", self.device(i), "mtu", str(self.mtu), "up")
        for i in range(2):
            self.start_node(i)

    def start_node(self, machine: int) -> None:
        """Starts Ray there."""
        flags = ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={self.folder}"]
        flags = [f"--address={self.ray_address}"] if machine else flags
        # Else Ray takes a head at this address for the one before, though that is in another namespace.
        (self.folder / "ray_current_cluster").unlink(missing_ok=True)
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", *flags, *self.flags]
        ray += [f"--node-ip-address={self.addresses[machine]}", "--object-store-memory=80000000"]
        environment = {**self.environment, **self.own[machine], MARK: self._mark(machine)}
        for tries_left in reversed(range(3)):  # Ray gives a node up that takes long to start
            try:
                run(*self.enter(machine), *ray, environment=environment)
                return
            except AssertionError:
                if not tries_left:
                    raise
                self.kill(machine)

    def enter(self, machine: int) -> list[str]:
        """Begins a command that runs on a machine."""
        return ["ip", "netns", "exec", f"{self.name}{machine}"] if self.has_link else []

    def device(self, machine: int) -> str:
        """The machine's end of the link."""
        return f"{self.name}v{machine}"

    def ip(self, machine: int, *command: str) -> None:
        run("ip", "-n", f"{self.name}{machine}", *command)

    def set_link(self, is_up: bool) -> None:
        """Cuts the link as if its plug were pulled, or plugs it in."""
        self.ip(1, "link", "set", self.device(1), "up" if is_up else "down")

    def processes(self, machine: int, name: str = "") -> list[psutil.Process]:
        """Those of a machine's Ray, its actors and ranks among them; with a name only those that have it, as raylet."""
        mark, found = self._mark(machine), dict[int, psutil.Process]()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == mark:  # which some of their children overwrite
                    found |= {one.pid: one for one in (process, *process.children(recursive=True))}
        return [one for one in found.values() if name in " ".join(command_of(one)[:3])]

    def ranks(self, machine: int) -> list[psutil.Process]:
        return self.processes(machine, "twofold.worker")

    def kill(self, machine: int, name: str = "") -> None:
        """Ends processes of a machine at once; without a name all of them, as a loss of power does."""
        for process in self.processes(machine, name):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _mark(self, machine: int) -> str:
        return f"{self.folder}/{machine}"

    def move(self, machine: int, address: str) -> None:
        """Gives a machine another address."""
        if self.has_link:
            self.ip(machine, "addr", "flush", "dev", self.device(machine))
            self.ip(machine, "addr", "add", f"{address}/24", "dev", self.device(machine))
        self.addresses[machine] = address

    def num_link_bytes(self) -> int:
        """That went over the link in both directions, headers included."""
        folder = f"/sys/class/net/{self.device(0)}/statistics"
        files = [f"{folder}/{name}_bytes" for name in ("rx", "tx")]
        return sum(map(int, run(*self.enter(0), "cat", *files).split()))

    def close(self) -> None:
        for machine in (1, 0):
            self.kill(machine)
        if self.has_link:
            for name in (f"{self.name}{i}" for i in range(2)):
                for pid in run("ip", "netns", "pids", name).split():
                    with suppress(psutil.NoSuchProcess):
                        psutil.Process(int(pid)).kill()
                run("ip", "netns", "del", name)
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def inside(self, machine: int = 0) -> Iterator[None]:
        """Puts this thread, and threads and processes that it starts, on a machine."""
        if not self.has_link:
            yield
            return
        libc = ctypes.CDLL(None, use_errno=True)
        with ExitStack() as stack:
            here, there = (
                stack.enter_context(open(path))
                for path in ("/proc/thread-self/ns/net", f"/run/netns/{self.name}{machine}")
            )
            assert libc.setns(there.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            try:
                yield
            finally:
                libc.setns(here.fileno(), CLONE_NEWNET)


@contextmanager
def two_machines(name: str = "twofold", **options: Any) -> Iterator[Machines]:
    machines = Machines(name, **options)
    try:
        machines.start()
        yield machines
    finally:
        machines.close()


def can_make_namespaces() -> bool:
    name = f"twofold-try-{os.getpid()}"
    try:
        run("ip", "netns", "add", name)
        run("ip", "netns", "exec", name, "true")
        run("ip", "netns", "del", name)
    except (OSError, AssertionError):
        return False
    return True


def run(*command: str, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def wait_until(what: Callable[[], object], timeout: float = 120.0) -> None:
    """Until a call of `what` is true."""
    deadline = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < deadline, f"still not after {timeout} s"
        time.sleep(0.05)
