"""One place of a rank, as an actor of Ray's: it starts the rank's process and ends it when the engine has gone.

The process is a rank like those of one machine: it inherits its channel to the engine, and files in memory that all
ranks of its node share. It ends with this actor by a lifeline, as any rank does with its engine. Ray sees no steps.
"""

import contextlib
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from dataclasses import astuple, fields

import ray

import twofold
from twofold import processes
from twofold.contract import SharedFiles
from twofold.executor.channels import LOOK_SECONDS
from twofold.executor.links import CHANNEL, LINK, connect, has_gone, send_exit_code
from twofold.executor.local import KEPT_MEMORY, LOOKS_STOPPED
from twofold.executor.places import Place, StartRanks
from twofold.native.build import start_build

SIOCGIFADDR = 0x8915  # asks for the address of an interface
OWN = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TORCH_CPP_LOG_LEVEL")  # variables of which the node knows better


class RankPlace:
    """Not for several threads at once."""

    command = (sys.executable, "-m", "twofold.worker")

    def __init__(self) -> None:
        self._files: SharedFiles | None = None
        self._listener: socket.socket | None = None

    def describe(self) -> Place:
        context, host = ray.get_runtime_context(), ray.util.get_node_ip_address()
        gpus = context.get_accelerator_ids().get("GPU", [])
        num_cores = len(os.sched_getaffinity(0))
        return Place(
            context.get_node_id(), host, _interface(host), num_cores, tuple(map(str, gpus)), twofold.__version__
        )

    def share_files(self, builds_kernels: bool) -> tuple[str, ...]:
        """Makes the files of this node's ranks → paths by which the node's other actors open them."""
        if builds_kernels:
            start_build()
        self._files = SharedFiles(*(os.memfd_create(f"twofold-{field.name}") for field in fields(SharedFiles)))
        return tuple(f"/proc/{os.getpid()}/fd/{file}" for file in astuple(self._files))

    def listen(self) -> tuple[str, int]:
        """Opens the port at which this rank will serve the store of all ranks, on the node's own address."""
        host = ray.util.get_node_ip_address()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=4096)
        return host, int(self._listener.getsockname()[1])

    def start(self, rank: int, order: StartRanks, paths: tuple[str, ...]) -> tuple[SharedFiles, int | None]:
        """Starts the rank's process → its descriptors of the shared files and of the store's port."""
        with contextlib.ExitStack() as stack:
            channel = stack.enter_context(connect(order.address, CHANNEL, rank, order.token))
            link = connect(order.address, LINK, rank, order.token)
            files = [os.open(path, os.O_RDWR) for path in paths]
            for file in files:
                stack.callback(os.close, file)
            listener = None if self._listener is None else stack.enter_context(self._listener).fileno()
            own = {name: os.environ[name] for name in OWN if name in os.environ}
            process, lifeline = processes.start(
                [*self.command, str(channel.fileno())],
                environment=order.environment[rank] | KEPT_MEMORY | own,
                pass_fds=[channel.fileno(), *files, *([] if listener is None else [listener])],
                stdin=subprocess.DEVNULL,
            )
        with contextlib.suppress(OSError):  # Ray's workers have a niceness of 15, which is not for what they serve
            os.setpriority(os.PRIO_PROCESS, process.pid, os.getpriority(os.PRIO_PROCESS, os.getppid()))
        threading.Thread(target=_watch, args=(process, lifeline, link), daemon=True).start()
        return SharedFiles(*files), listener


def _watch(process: "subprocess.Popen[bytes]", lifeline: int, link: socket.socket) -> None:
    """Ends the rank when its engine has gone or is out of reach, and tells the engine how the rank ended."""
    num_looks_stopped = 0
    while process.poll() is None and num_looks_stopped < LOOKS_STOPPED and not has_gone(link, LOOK_SECONDS):
        num_looks_stopped = num_looks_stopped + 1 if processes.is_stopped(process.pid) else 0
    process.kill()
    os.close(lifeline)
    code = -signal.SIGSTOP if num_looks_stopped >= LOOKS_STOPPED else process.wait()
    send_exit_code(link, code)
    link.close()


def _interface(host: str) -> str:
    """The network interface that has an IPv4 address; empty if none has."""
    if host.startswith("127."):  # loopback has all of these
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                found = fcntl.ioctl(sock.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == host:
                    return name
    return ""
