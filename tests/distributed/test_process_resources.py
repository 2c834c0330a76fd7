"""Ranks without room, descriptors or processes, and what is left of them: nothing, however their engine ends."""

import errno
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_models import tiny_config, tiny_model

from twofold import LLM, ModelError, SamplingParams
from twofold.engine import engine as engine_module
from twofold.executor.local import KEPT_MEMORY, LocalExecutor

ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "prefill_context_parallel_size": 2,
    "skip_tokenizer_init": True,
    "max_num_batched_tokens": 64,
    "block_size": 8,
}
PROMPTS = [{"prompt_token_ids": [5, 6, 7]}, {"prompt_token_ids": list(range(3, 90))}]
GREEDY = SamplingParams(temperature=0, max_tokens=10)
SECONDS = 20  # in which a process must be gone, also on a machine that is busy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_model(tiny_config("llama")).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    with LLM(str(folder), **ARGUMENTS) as llm:
        return tokens_of(llm)


def tokens_of(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def pids_of(llm: LLM) -> list[int]:
    assert isinstance(llm.engine.executor, LocalExecutor)
    return llm.engine.executor.pids


def wait_until_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=SECONDS)
    assert not alive


def descriptors() -> list[str]:
    """What this process has open."""
    names = []
    for number in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{number}").partition(":")[0])
        except OSError:  # the one of the listing itself
            continue
    return sorted(names)


# --- No room ---------------------------------------------------------------------------------------------------------

LIMITED = """
import resource, sys
from twofold import LLM, SamplingParams

resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
with LLM(sys.argv[1], prefill_context_parallel_size=2, skip_tokenizer_init=True) as llm:
    prompts = [{"prompt_token_ids": [5, 6, 7]}, {"prompt_token_ids": list(range(3, 90))}]
    for output in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=10), use_tqdm=False):
        print(*output.outputs[0].token_ids)
"""


def test_ranks_that_cannot_share_memory_answer_alike(folder: Path, expected: list[list[int]]) -> None:
    """What ranks shared were files with holes: with a full disk every step was a SIGBUS, and new ranks had no better
    luck. Now their room is taken at the start; a limit on the size of files stands for the disk. Each way out is told
    in one line, with its cause."""
    command = [sys.executable, "-c", LIMITED, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [[int(token) for token in line.split()] for line in done.stdout.splitlines()] == expected
    weights, entries, sums = done.stderr.splitlines()
    assert sums.startswith("sums are gathered")
    assert sums.endswith("File too large")
    assert weights.startswith("each rank loads weights of its own")
    assert entries.startswith("KV entries travel by all-gather")
    assert weights.endswith("File too large")
    assert entries.endswith("File too large")


POOR = """
from twofold.parallel import shared_memory
from twofold.worker import worker

shared_memory.free_bytes = worker.free_bytes = lambda: 5000
worker.main()
"""


def test_no_memory_for_the_weights_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards from the kernel, which would kill a rank, or the engine, without a word. The room is looked at first."""
    monkeypatch.setattr(LocalExecutor, "command", (sys.executable, "-c", POOR))
    children = set(psutil.Process().children())
    with pytest.raises(
        ModelError, match=r"cannot share .* are needed and 5000 are free.*lower prefill_context"
    ) as error:
        LLM(str(folder), **ARGUMENTS)
    assert "\n" not in str(error.value)
    assert set(psutil.Process().children()) <= children


# --- No descriptors, no processes ------------------------------------------------------------------------------------


def fail(code: int) -> Callable[..., Any]:
    def raise_it(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return raise_it


def fail_after(number: int, code: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which fails when it is called more often than that."""
    calls = iter([function] * number)
    return lambda *args, **kwargs: next(calls, fail(code))(*args, **kwargs)


FAILURES: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "files": (os, "memfd_create", fail_after(2, errno.EMFILE, os.memfd_create)),
    "a socket": (socket, "socketpair", fail_after(1, errno.EMFILE, socket.socketpair)),
    "a pipe": (os, "pipe", fail_after(1, errno.ENFILE, os.pipe)),
    "a process": (subprocess, "Popen", fail(errno.EAGAIN)),
}


def test_recovery_goes_on_without_descriptors_and_processes(
    folder: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first EMFILE, EAGAIN or ENOSPC ended the engine, though the next try would have done. Each try of four lacks
    something else, the fifth comes through, and none leaves a descriptor."""
    monkeypatch.setattr(engine_module, "RESTART_DELAYS", (0.0,) * 5)
    with LLM(str(folder), **ARGUMENTS) as llm:
        make, failures = llm.engine._make_executor, iter(FAILURES.values())
        before = descriptors()
        assert make is not None

        def make_or_fail(start_timeout: float | None) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                if (failure := next(failures, None)) is not None:
                    left = descriptors()
                    patch.setattr(*failure)
                    try:
                        return make(start_timeout)
                    finally:
                        assert descriptors() == left
                return make(start_timeout)

        llm.engine._make_executor = make_or_fail
        psutil.Process(pids_of(llm)[1]).kill()
        assert tokens_of(llm) == expected
        assert descriptors() == before
    causes = ["[Errno 24] Too many", "[Errno 24] Too many", "[Errno 23] Too many", "[Errno 11] Resource temporarily"]
    lines = [message for message in caplog.messages if "did not start" in message]
    assert len(lines) == 4
    for line, cause in zip(lines, causes, strict=True):
        assert line.startswith(f"the ranks did not start: cannot start 2 ranks: {cause}")


# --- Ends ------------------------------------------------------------------------------------------------------------

LOADING = """
import sys
from twofold import LLM
from twofold.executor.local import KEPT_MEMORY, LocalExecutor

LocalExecutor.command = (sys.executable, "-c", "import re; re.match('(a*)*b', 'a' * 100)")
LLM(sys.argv[1], prefill_context_parallel_size=2, skip_tokenizer_init=True)
"""


def test_no_rank_outlives_an_engine_that_dies_while_it_loads(folder: Path) -> None:
    """Ranks waited for minutes in the store of their collectives, with the interpreter's lock held: the thread that
    was to end them with their engine could not run. These ranks hold it for ever."""
    with subprocess.Popen([sys.executable, "-c", LOADING, str(folder)]) as parent:
        deadline, ranks = time.monotonic() + 60, list[psutil.Process]()
        while len(ranks) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
            ranks = psutil.Process(parent.pid).children()
        time.sleep(1.0)
        assert all(rank.is_running() for rank in ranks)
        parent.kill()
        wait_until_gone(ranks)


def test_a_thread_may_make_an_engine_and_end(folder: Path, expected: list[list[int]]) -> None:
    """Guards users of threads: the kernel has also a signal for the end of a parent, but it comes at the end of the
    thread that started the process."""
    made: list[LLM] = []
    thread = threading.Thread(target=lambda: made.append(LLM(str(folder), **ARGUMENTS)))
    thread.start()
    thread.join()
    with made[0] as llm:
        assert tokens_of(llm) == expected
        assert llm.engine.stats.num_restarts == 0


def test_an_engine_that_nobody_holds_leaves_nothing(folder: Path) -> None:
    """Each `del llm` left two descriptors, and usually a folder and its ranks' memory for a while."""
    for _ in range(2):  # the first opens what stays open
        before = descriptors()
        llm = LLM(str(folder), **ARGUMENTS)
        tokens_of(llm)
        ranks = [psutil.Process(pid) for pid in pids_of(llm)]
        del llm
        assert not any(rank.is_running() for rank in ranks)
    assert descriptors() == before


EXIT = """
import os, sys
from twofold import LLM

llm = LLM(sys.argv[1], prefill_context_parallel_size=2, skip_tokenizer_init=True)
if os.fork() == 0:  # the ranks are not those of a copy of this process
    sys.exit()
os.wait()
prompt = {"prompt_token_ids": [5, 6, 7]}
assert llm.generate(prompt, use_tqdm=False) and llm.engine.stats.num_restarts == 0
print(*llm.engine.executor.pids)
"""


def test_an_exit_without_shutdown_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    """Guards scripts that do not close their engine; its ranks are gone before the script is."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EXIT, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not any(psutil.pid_exists(int(pid)) for pid in done.stdout.split())
    assert not list(tmp_path.glob("twofold*"))


CACHE = """
import psutil, torch
from twofold.kv.cache import KVCache

freed = [torch.empty(8 << 20, dtype=torch.uint8) for _ in range(20)]
last = torch.empty(8 << 20, dtype=torch.uint8)
del freed
before = psutil.Process().memory_info().rss
cache = KVCache([1 << 10], 1 << 10, 64, torch.bfloat16, torch.device("cpu"))
print(psutil.Process().memory_info().rss - before, cache.stacks[0].nbytes, cache.stacks[0].any().item())
"""


def test_a_cache_takes_no_memory_before_it_is_written() -> None:
    """Not even where a rank has freed as much before, and keeps it."""
    done = subprocess.run(
        [sys.executable, "-c", CACHE], env=os.environ | KEPT_MEMORY, capture_output=True, text=True, check=True
    )
    taken, size, has_numbers = done.stdout.split()
    assert int(taken) < int(size) / 10
    assert has_numbers == "False"
