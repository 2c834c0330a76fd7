"""Our kernels for CPUs (`kernels.cpp`): compiled by the system's C++ compiler, kept on disk, loaded when they are there.

Nobody waits for the compiler. It runs at low priority while the engine starts, for some seconds and only the first time.
Until then, and where there is no compiler, PyTorch's own operations serve. No PyTorch is imported until kernels load.
"""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fPIC", "-fopenmp", "-fno-math-errno", "-shared")
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # PyTorch 2.11: whose stable interface they use
LOOK_SECONDS = 0.5  # between looks for a library that is being compiled

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where libraries are kept: TWOFOLD_CACHE, or `twofold` in the user's cache."""
    if folder := os.environ.get("TWOFOLD_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twofold"


@cache
def library() -> Path:
    """The file of the kernels for this source, processor and PyTorch, compiled or not."""
    parts = [SOURCE.read_bytes(), *(flag.encode() for flag in (*FLAGS, TARGET)), version("torch").encode(), _processor()]
    return cache_folder() / f"kernels-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"


def _processor() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return b"".join(sorted({line for line in lines if line.startswith((b"flags", b"Features", b"model name"))}))


def start_build() -> "subprocess.Popen[bytes] | None":
    """Starts to compile the kernels, if they are not there and can be made here."""
    if sys.platform != "linux" or _is_off() or library().exists():
        return None
    try:
        library().parent.mkdir(parents=True, exist_ok=True)
        return subprocess.Popen(
            [sys.executable, "-P", __file__], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
        )
    except OSError as error:
        logger.info("kernels for this CPU are not compiled: %s", error)
        return None


def build() -> bool:
    """Compiles the kernels → whether they are there. Others who compile them at the same time do no harm."""
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")
    torch = find_spec("torch")
    if compiler is None or torch is None or not torch.submodule_search_locations:
        return False
    folder = Path(torch.submodule_search_locations[0])
    include, unfinished = folder / "include", library().with_suffix(f".{os.getpid()}")
    command = [compiler, *FLAGS, TARGET, f"-I{include}", f"-I{include}/torch/csrc/api/include", str(SOURCE)]

    command += [f"-L{folder / 'lib'}", "-ltorch_cpu", "-o", str(unfinished)]
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            logger.info("kernels for this CPU are not compiled: %s", done.stderr.decode(errors="replace")[:500])
            return False
        unfinished.rename(library())
        return True
    except OSError:
        return False
    finally:
        unfinished.unlink(missing_ok=True)


class _Kernels:
    """Whether the kernels are loaded in this process."""

    def __init__(self) -> None:
        self.is_loaded, self._next_look, self._ends = False, 0.0, False

    def __bool__(self) -> bool:
        """Loads them if they are there; looks for them from time to time."""
        if self.is_loaded:
            return True
        if self._ends or (now := time.monotonic()) < self._next_look:
            return False
        self._next_look = now + LOOK_SECONDS
        if _is_off() or sys.platform != "linux":
            self._ends = True
        elif library().exists():
            self._load()
        return self.is_loaded

    def _load(self) -> None:
        import torch

        try:
            torch.ops.load_library(str(library()))
        except (OSError, RuntimeError) as error:
            logger.warning("kernels for this CPU are not used: %s", error)
            self._ends = True
            return
        self.is_loaded = True


kernels = _Kernels()


def _is_off() -> bool:
    """TWOFOLD_NATIVE=0: PyTorch's own operations, for comparison."""
    return os.environ.get("TWOFOLD_NATIVE") == "0"


if __name__ == "__main__":
    os.nice(19)
    sys.exit(not build())
