"""Starts processes that import nothing from the working directory, and that end with this one, however it ends."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def start(
    command: Sequence[str], *, environment: dict[str, str] | None = None, pass_fds: Sequence[int] = (), **options: Any
) -> tuple[subprocess.Popen[bytes], int]:
    """→ the process, and its lifeline: a file descriptor that lets it live until it is closed. Raises OSError.

    `options` are those of `Popen`. The caller must not be interrupted before it has kept both (see `no_interrupts`).
    """
    life_read, life_write = os.pipe()
    try:
        process = subprocess.Popen(
            command,
            pass_fds=[*pass_fds, life_read],
            env=os.environ | module_paths() | (environment or {}),
            **options,
        )
        _tie(process.pid, life_read)
    except BaseException:
        os.close(life_write)
        raise
    finally:
        os.close(life_read)
    return process, life_write


def _tie(pid: int, life_read: int) -> None:
    """Has the kernel kill a process when the other end of the pipe closes, as it does when this one ends in any way.

    The process has nothing to do for it, so it cannot miss it: not while it imports PyTorch, and not while it waits in
    C++ with the interpreter's lock held. If this one ends before this call, the other finds its channel closed.
    """
    if sys.platform == "linux":  # elsewhere, and in sandboxes without it, an idle process finds its channel closed
        with contextlib.suppress(OSError):
            fcntl.fcntl(life_read, fcntl.F_SETSIG, signal.SIGKILL)
            fcntl.fcntl(life_read, fcntl.F_SETOWN, pid)
            fcntl.fcntl(life_read, fcntl.F_SETFL, os.O_ASYNC)


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped a process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # it has ended
        return False
    return stat.rpartition(")")[2].split()[0] == "T"


@contextlib.contextmanager
def no_interrupts() -> Iterator[None]:
    """Holds Ctrl-C back. A process started meanwhile never gets it: it is for this one, which ends the others."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def module_paths() -> dict[str, str]:
    """Lets a process import what this one can, but nothing from the working directory: a model that somebody has
    downloaded there may come with a numpy.py. Only Twofold itself may lie there, so its folder comes last.
    """
    folders = [
        folder for folder in map(str, sys.path) if os.pathsep not in folder and not _is_working_directory(folder)
    ]
    folders.append(str(Path(__file__).parents[1]))
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(folders)}


def _is_working_directory(folder: str) -> bool:
    try:
        return os.path.samefile(folder or os.curdir, os.curdir)
    except OSError:  # there is no such folder
        return False
