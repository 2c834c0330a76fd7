"""Start engines and servers and end them by every means: no process, folder, shared memory or descriptor is left.

python benchmarks/server_ends.py --model tiny -pcp 2 --ends 50 --output-json F

Whatever a start makes has a mark of its own: an environment variable in each process, and a temporary folder.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx
import psutil
from server_common import arguments, tiny_or, write

SECONDS = 10.0  # until all must be gone
MARK = "TWOFOLD_STARTED_BY"
OFFLINE = """
import os, sys
from twofold import LLM, SamplingParams

def descriptors():
    names = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return sorted(os.readlink(name).partition(":")[0] for name in names if os.path.islink(name))

def make():
    return LLM(sys.argv[1], prefill_context_parallel_size=int(sys.argv[2]))

def answer(llm, max_tokens=8):
    return llm.generate("Is anybody there?", SamplingParams(max_tokens=max_tokens, ignore_eos=True), use_tqdm=False)
"""
SCRIPTS = {  # what a user's script does -> the exit code
    "with make() as llm: answer(llm)": 0,
    "llm = make(); answer(llm); before = descriptors(); del llm; assert len(before) > len(descriptors())": 0,
    "for _ in 'abc': llm = make(); answer(llm); del llm; now = descriptors(); before = vars().get('before', now); "
    "assert now == before": 0,
    "llm = make(); answer(llm); sys.exit(3)": 3,
    "llm = make(); answer(llm); raise KeyError": 1,
    "llm = make(); answer(llm); os._exit(4)": 4,
}
CALLS = "llm = make(); print('listening on', file=sys.stderr, flush=True); answer(llm, 2000)"
Case = tuple[str, str, str | None, int]
SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL, "Ctrl-C": signal.SIGINT}


def marked(mark: str) -> list[psutil.Process]:
    """Processes that were started by the start of this mark, whoever their parent is now."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def shared_memory() -> set[str]:
    """Segments of both kinds that have a name."""
    return {*os.listdir("/dev/shm"), *Path("/proc/sysvipc/shm").read_text().splitlines()}


def interrupt(process: subprocess.Popen[str], when: str, number: int, pause: float) -> None:
    """Sends the signal after a pause: while the model loads; or in an idle or busy server, or in a call of a script."""
    assert process.stderr is not None
    if when == "loading":
        time.sleep(pause)
    else:
        while "listening on" not in (line := process.stderr.readline()):
            assert line, "it ended by itself"
        if when == "busy":
            threading.Thread(target=read_stream, args=[line.split()[-1]], daemon=True).start()
        time.sleep(pause % 1)
    if number == signal.SIGINT:  # a terminal sends it to the ranks, too
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)


def read_stream(url: str) -> None:
    body = {"model": "model", "prompt": "Is anybody there?", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with suppress(httpx.HTTPError), httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        for _ in answer.iter_bytes():
            pass


def cases() -> Iterator[Case]:
    """→ who, its code, when to send it a signal, and which signal or which exit code it has."""
    for number in SIGNALS.values():
        for when in ("loading", "idle", "busy"):
            yield "server", "", when, number
        for when in ("loading", "in a call"):
            yield "script", CALLS, when, number
    for script, code in SCRIPTS.items():
        yield "script", script, None, code


def end(model: str, args: Namespace, case: Case, pause: float) -> dict[str, Any]:
    """One start and its end → what is left."""
    who, script, when, number = case
    serve = ["-m", "twofold.cli.main", "serve", model, "-pcp", str(args.pcp), "--port", "0", "--drain-timeout", "1"]
    command = ["-c", OFFLINE + script, model, str(args.pcp)] if who == "script" else serve
    if who == "server":
        command += ["--served-model-name", "model", *args.engine.split()]
    before, mark = shared_memory(), str(uuid.uuid4())
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | {MARK: mark, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        if when is not None:
            interrupt(process, when, number, pause)
        _, errors = process.communicate(timeout=120)
        ended = time.monotonic()
        while (processes := marked(mark)) and time.monotonic() < ended + SECONDS:
            time.sleep(0.02)
        seconds = time.monotonic() - ended
        left = [f"process {one.pid}: {one.cmdline()}" for one in processes]
        left += [f"file {name}" for name in os.listdir(folder)] + [
            f"segment {name}" for name in shared_memory() - before
        ]
        for one in processes:
            one.kill()
    if when is None and process.returncode != number:
        left.append(f"exit code {process.returncode} for {number}: {errors[-500:]}")
    name = (
        f"{who}: {script.partition('answer(llm); ')[2] or script}"
        if when is None
        else f"{who}, {when}, signal {number}"
    )
    return {"end": name, "exit_code": process.returncode, "seconds_until_gone": round(seconds, 2), "left": left}


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--ends", type=int, default=50)
    args = parser.parse_args()
    rng, ends = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_or(args.model, Path(folder))
        begin = time.monotonic()
        end(model, args, ("script", "make().shutdown()", None, 0), 0.0)
        seconds = time.monotonic() - begin  # in which a model is loaded
        for case in islice(cycle(cases()), args.ends):
            ends.append(end(model, args, case, seconds * rng.random()))
            print(ends[-1], file=sys.stderr)
    left = [one for one in ends if one["left"]]
    longest = max(one["seconds_until_gone"] for one in ends)
    write(args, {"ends": len(ends), "left": left, "longest_seconds_until_gone": longest, "each": ends})
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
