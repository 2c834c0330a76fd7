"""A process for work that a stranger's input could make endless or huge: it has limits, and others go on meanwhile.

Python can neither end a thread nor limit its memory. A helper that exceeds a limit is ended; the next call starts a new
one. It is also ended by the kernel when the server ends.
"""

import asyncio
import importlib
import os
import pickle
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from twofold import processes
from twofold.errors import UnavailableError

MAX_BYTES = 1 << 30  # of memory that a call may take
TOO_MUCH_MEMORY = f"more than {MAX_BYTES >> 20} MiB of memory"


class LimitError(Exception):
    """A call took too much of something; the message says of what."""


class Helper:
    """Calls a function of a module in a process: one call at a time, each for `seconds` of a processor at most."""

    def __init__(self, module: str, function: str, seconds: float) -> None:
        self._command = [sys.executable, "-m", __name__, module, function, str(seconds)]
        self._seconds = seconds
        self._thread = ThreadPoolExecutor(1, "helper")  # it waits for the process
        self._is_closed = False
        self._start()

    def _start(self) -> None:
        with processes.no_interrupts():
            self._process, self._lifeline = processes.start(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        if self._is_closed:  # meanwhile
            self._process.kill()

    async def call(self, *args: Any) -> Any:
        """What the function returns; raises what it raises.

        Raises:
            LimitError: the call took too long or too much memory.
            UnavailableError: the process cannot be started, or was ended by somebody.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._call, args)

    def _call(self, args: tuple[Any, ...]) -> Any:
        if self._is_closed:
            raise UnavailableError("the server is shutting down")
        try:
            if self._process.poll() is not None:
                self._end()
                self._start()
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            pickle.dump(args, self._process.stdin, pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
            returned, answer = pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            raise self._explain(self._end()) from None
        if returned:
            return answer
        raise answer

    def _explain(self, exit_code: int) -> Exception:
        if self._is_closed:
            return UnavailableError("the server is shutting down")
        if exit_code in (-signal.SIGKILL, -signal.SIGTERM):  # a person, or the kernel for want of memory
            return UnavailableError("the process that read this request was ended; try again")
        return LimitError(f"more than {self._seconds:g} s" if exit_code == -signal.SIGPROF else TOO_MUCH_MEMORY)

    def _end(self) -> int:
        """→ the exit code."""
        self._process.kill()
        with suppress(OSError), self._process:  # closes its pipes
            os.close(self._lifeline)
        return self._process.returncode

    def close(self) -> None:
        """Ends the process, and with it the call under way."""
        self._is_closed = True
        self._process.kill()
        self._thread.shutdown(wait=False)


def _serve(module: str, name: str, seconds: float) -> None:
    """The process: takes arguments from stdin, and writes what the function makes of them to stdout."""
    requests, answers = os.fdopen(0, "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what somebody prints is no answer
    function = getattr(importlib.import_module(module), name)
    own_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (own_bytes + MAX_BYTES,) * 2)
    while True:
        try:
            args = pickle.load(requests)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF ends the process, whatever it does
        try:
            answer = pickle.dumps((True, function(*args)), pickle.HIGHEST_PROTOCOL)
        except MemoryError:
            answer = pickle.dumps((False, LimitError(TOO_MUCH_MEMORY)))
        except Exception as error:
            answer = pickle.dumps((False, error))
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(answer)
        answers.flush()
        del args, answer


if __name__ == "__main__":
    from twofold.server import helper  # not this module's own name, under which its errors would not be known

    helper._serve(sys.argv[1], sys.argv[2], float(sys.argv[3]))
