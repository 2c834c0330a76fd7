"""Memory that the ranks of one machine share. Its room is taken first: writing without room would be a SIGBUS."""

import errno
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import torch

from twofold.parallel.mesh import Mesh

CACHE_LINE = 64  # bytes
NUM_LOOKS = 100  # at a peer's flag, some microseconds, before others may have this core
YIELD_SECONDS = 2e-3  # that a rank looks again at once; then it sleeps between looks
SLEEP_SECONDS = 200e-6
NUM_SHAPES = 256  # whose views of the shared memory are kept


class Rendezvous:
    """CPU ranks hand each other small tensors in microseconds; a collective over sockets takes a hundred times as long.

        x ──copy──► my part of the buffer, my flag = number of this call, wait for all flags ──► everyone's parts

    A flag has a cache line of its own, and only its rank writes it. There are two buffers, used in turn: a rank that
    writes in call n + 2 has seen all flags of call n + 1, which its peers set after they had read the parts of call n.

    Nothing here orders memory but the processor. x86 does: it keeps a core's stores in order, its loads in order, and
    loads before later stores, so whoever sees a flag sees the part, and whoever sets one has read what it read before.
    """

    def __init__(self, mesh: Mesh, max_num_bytes: int, file: int) -> None:
        """`max_num_bytes` of a rank's tensor have room. `file` is a descriptor of the same new file on every rank.

        Raises:
            OSError: there is no room in memory. Every rank raises it.
        """
        self.max_num_bytes = max_num_bytes
        self._rank = mesh.rank
        part_bytes = -(-max_num_bytes // CACHE_LINE) * CACHE_LINE
        memory = share(mesh, file, mesh.size * (CACHE_LINE + 2 * part_bytes))
        flags, parts = memory.split([mesh.size * CACHE_LINE, 2 * mesh.size * part_bytes])
        self._flags = memoryview(flags.numpy()).cast("Q")  # looks cost a tenth of a tensor's
        self._parts = parts.view(2, mesh.size, part_bytes)
        self._num_calls = 0
        self._others = [rank * (CACHE_LINE // 8) for rank in range(mesh.size) if rank != mesh.rank]
        self._views = lru_cache(NUM_SHAPES)(self._make_views)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Every rank's x, which have one shape; they are overwritten by the next call but one."""
        self._num_calls += 1
        parts = self._views(self._num_calls % 2, x.shape, x.dtype)
        parts[self._rank].copy_(x)
        self._flags[self._rank * (CACHE_LINE // 8)] = self._num_calls
        for flag in self._others:
            self._wait(flag)
        return parts

    @torch.inference_mode(False)  # a view from inside may not be written to outside
    def _make_views(self, turn: int, shape: torch.Size, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Every rank's part [*shape] of a buffer."""
        num_bytes = shape.numel() * dtype.itemsize
        return tuple(part[:num_bytes].view(dtype).view(shape) for part in self._parts[turn])

    def _wait(self, flag: int) -> None:
        """Waits until a rank has written its part. If that rank was lost, the engine ends this one."""
        flags, number = self._flags, self._num_calls
        for _ in range(NUM_LOOKS):
            if flags[flag] >= number:
                return
        sleepless = time.monotonic() + YIELD_SECONDS
        while flags[flag] < number:
            if time.monotonic() < sleepless:
                os.sched_yield()
            else:
                time.sleep(SLEEP_SECONDS)


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
