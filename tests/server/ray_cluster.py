"""An application of Ray Serve on a cluster of its own, for tests and benchmarks."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

DRIVER = Path(__file__).with_name("ray_application.py")
SOURCE = Path(__file__).parents[2] / "src"
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}


class Application:
    def __init__(self, url: str, process: "subprocess.Popen[str]") -> None:
        self.url, self.process = url, process
        self.http = httpx.Client(base_url=url, timeout=60)
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def replicas(self) -> list[psutil.Process]:
        return [one for one in self._all() if "ServeReplica:default:TwofoldServer:" in _name(one)]

    def ranks(self) -> list[psutil.Process]:
        return [one for one in self._all() if "twofold.worker" in _name(one)]

    def _all(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


def _name(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def wait_until(what: Callable[[], object], timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < deadline, f"still not after {timeout} s"
        time.sleep(0.05)


@contextmanager
def run_application(config: dict[str, Any]) -> Iterator[Application]:
    """Runs what `build_openai_app` makes of a configuration, and waits until it serves."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="tfserve", dir="/tmp")  # Ray's sockets need a short path
    log = Path(folder, "log")
    paths = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, str(DRIVER), json.dumps(config), str(port), folder],
            env=os.environ | {"PYTHONPATH": paths, **ENVIRONMENT},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
        )  # fmt: skip
    assert process.stdout is not None
    try:
        assert "serving" in process.stdout.readline(), log.read_text()[-4000:]
        application = Application(f"http://127.0.0.1:{port}", process)
        with application.http, application.client:
            yield application
    finally:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:  # Ray's own way takes 5 s
            with suppress(psutil.Error):
                one.kill()
        process.communicate()
        shutil.rmtree(folder, ignore_errors=True)
