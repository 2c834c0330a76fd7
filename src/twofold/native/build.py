"""Compiles our kernels for CPUs with the system's C++ compiler, once for a processor and a PyTorch. No PyTorch needed.

Nobody waits for the compiler. It runs at low priority for some seconds, when an engine starts for the first time. Until
then, and where there is no compiler, PyTorch's own operations serve.
"""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = (
    "-O3", "-march=native", "-std=c++20", "-fPIC", "-fopenmp", "-fno-math-errno", "-shared",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # they use the stable interface of PyTorch 2.11
)  # fmt: skip

logger = logging.getLogger(__name__)


@cache
def library() -> Path:
    """The file of the kernels for this source, processor and PyTorch, compiled or not."""
    made_of = [SOURCE.read_bytes(), " ".join((*FLAGS, version("torch"))).encode(), _processor()]
    return cache_folder() / f"kernels-{hashlib.sha256(b'|'.join(made_of)).hexdigest()[:16]}.so"


def cache_folder() -> Path:
    """TWOFOLD_CACHE, or `twofold` in the user's cache."""
    if folder := os.environ.get("TWOFOLD_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twofold"


def _processor() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return b"".join(sorted({line for line in lines if line.startswith((b"flags", b"Features", b"model name"))}))


_builders: list["subprocess.Popen[bytes]"] = []  # kept, because one that is dropped while it runs is a warning


def start_build() -> None:
    """Starts to compile the kernels, if they are not there."""
    if library().exists():
        return
    if compiler() is None:
        logger.warning(
            "no C++ compiler was found (g++, c++ or CXX), so PyTorch's operations serve; with one, kernels "
            "for this CPU are compiled once, and answers come sooner"
        )
        return
    try:
        library().parent.mkdir(parents=True, exist_ok=True)
        quiet = subprocess.DEVNULL
        command = [sys.executable, "-P", __file__]
        _builders.append(subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True))
    except OSError as error:
        logger.info("kernels for this CPU are not compiled: %s", error)


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")


def build() -> bool:
    """Compiles the kernels → whether they are there. Others who compile them at the same time do no harm."""
    cxx, torch = compiler(), find_spec("torch")
    if cxx is None or torch is None or not torch.submodule_search_locations:
        return False
    folder = Path(torch.submodule_search_locations[0])
    include, unfinished = folder / "include", library().with_suffix(f".{os.getpid()}")
    # Linked to PyTorch's libraries, so that its threads run our loops: two teams would wait for each other's cores.
    command = [cxx, *FLAGS, f"-I{include}", f"-I{include}/torch/csrc/api/include", str(SOURCE)]
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


if __name__ == "__main__":
    os.nice(19)
    sys.exit(not build())
