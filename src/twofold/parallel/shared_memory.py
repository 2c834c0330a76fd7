"""Memory that the ranks of one machine share. Its room is taken first: writing without room would be a SIGBUS."""

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from twofold.parallel.mesh import Mesh


def share(mesh: Mesh, file: int, num_bytes: int) -> torch.Tensor:
    """Maps the same new memory on every rank → [num_bytes] bytes. `file` is a descriptor of the same file on all.

    Raises:
        OSError: there is no room. Every rank raises it.
    """
    with all_or_none(mesh):
        if mesh.rank == 0:
            reserve(file, 0, num_bytes)
    return map_file(file, num_bytes)


def reserve(file: int, offset: int, num_bytes: int) -> None:
    """Takes room for a part of a file.

    Raises:
        OSError: there is no room.
    """
    if num_bytes > (free := free_bytes()):  # taking them would get this process killed
        raise OSError(errno.ENOMEM, f"{num_bytes} bytes are needed and {free} are free")
    if num_bytes:
        os.posix_fallocate(file, offset, num_bytes)


def map_file(file: int, num_bytes: int) -> torch.Tensor:
    """The first `num_bytes` of a file that is at least as long → [num_bytes] bytes."""
    return torch.frombuffer(mmap.mmap(file, num_bytes), dtype=torch.uint8)


@contextmanager
def all_or_none(mesh: Mesh) -> Iterator[None]:
    """An OSError that one rank raises in the block is raised on every rank."""
    error: OSError | None = None
    try:
        yield
    except OSError as caught:
        error = caught
    errnos = torch.zeros(mesh.size)
    mesh.all_gather(errnos, torch.tensor([0.0 if error is None else float(error.errno or errno.EIO)]))
    if error is not None:
        raise error
    if code := int(errnos.max()):
        raise OSError(code, os.strerror(code))


def free_bytes() -> int:
    """Memory that this process may still take: of the machine, and of its control group (version 2)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    with suppress(OSError, ValueError):  # no such group, or no limit: "max"
        group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().rpartition("::/")[2].strip()
        limit = int((group / "memory.max").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = int(stat["active_file"]) + int(stat["inactive_file"])  # the kernel can drop it
        free = min(free, limit - int((group / "memory.current").read_text()) + cached)
    return free
