"""A server in its own process, and helpers to test it."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

FAULTY = Path(__file__).with_name("faulty_server.py")
READY = re.compile(r"listening on (http://\S+)")


class Server:
    """A running `twofold serve`."""

    def __init__(self, process: subprocess.Popen[str], url: str, log: Path, faults: Path, key: str) -> None:
        self.process, self.url, self.log, self.faults, self.key = process, url, log, faults, key
        self.http = httpx.Client(base_url=url, timeout=60, headers={"Authorization": f"Bearer {key}"})

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=self.key, **({"max_retries": 0, "timeout": 60} | options)
        )

    def async_client(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key=self.key, **({"max_retries": 0, "timeout": 60} | options)
        )

    def ranks(self) -> list[psutil.Process]:
        """The processes of the ranks, in their order."""
        children = psutil.Process(self.process.pid).children()
        return sorted((child for child in children if _is_rank(child)), key=lambda child: child.pid)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = self.http.get("/metrics").text.splitlines()
        values = [float(line.split()[-1]) for line in lines if re.match(rf"twofold:{name}[{{ ]", line)]
        assert values, name
        return sum(values)

    def health(self) -> tuple[int, str]:
        response = self.http.get("/health")
        return response.status_code, response.json()["status"]

    def wait_for(self, what: Any, timeout: float = 30.0) -> None:
        deadline = time.monotonic() + timeout
        while not what():
            assert time.monotonic() < deadline, f"still not after {timeout} s:\n{self.log.read_text()[-2000:]}"
            time.sleep(0.05)

    def assert_idle(self) -> None:
        """Nothing is left of any request."""
        names = ("num_requests_running", "num_requests_waiting", "num_kv_blocks_in_use")
        self.wait_for(lambda: self.health()[0] == 200)
        self.wait_for(lambda: all(self.metric(name) == 0 for name in names), 10)


def _is_rank(process: psutil.Process) -> bool:
    try:
        return any("worker" in part or "faulty_rank" in part for part in process.cmdline())
    except psutil.Error:
        return False


@contextlib.contextmanager
def serve(model: str | Path, folder: Path, *flags: str, key: str = "none", faulty: bool = True) -> Iterator[Server]:
    """A server of `model`. `folder` takes its log and the faults that it is to have."""
    folder.mkdir(parents=True, exist_ok=True)
    faults = folder / "faults"
    faults.mkdir(exist_ok=True)
    log = folder / "log"
    program = [str(FAULTY)] if faulty else ["-m", "twofold.cli.main"]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, *program, "serve", str(model), "--port", "0", *flags],
            stderr=stderr,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TWOFOLD_FAULTS": str(faults)},
            text=True,
        )
    try:
        deadline = time.monotonic() + 120
        while (ready := READY.search(log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        server = Server(process, ready[1], log, faults, key)
        with server.http:
            yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
