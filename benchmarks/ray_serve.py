"""Run replicas under Ray Serve LLM: lose one during streams, scale with the load, place ranks by Ray, `serve run`.

    python benchmarks/ray_serve.py kills --trials 10 --output-json F
    python benchmarks/ray_serve.py scaling
    python benchmarks/ray_serve.py ranks        # engines whose ranks Ray places, beside their replica
    python benchmarks/ray_serve.py command      # examples/ray_serve/demo.yaml from the command line

Each exits with 0 if it passed.
"""

import asyncio
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
from server_common import arguments, write  # which finds the tests' modules, too

from ray_cluster import ENVIRONMENT, SOURCE, Application, run_application, wait_until  # isort: skip
from tiny import save_tiny_model  # isort: skip

DEMO = Path(__file__).parents[1] / "examples/ray_serve/demo.yaml"
ENGINE = {"dtype": "float32", "kv_cache_memory_bytes": 20_000_000, "max_num_batched_tokens": 256}
NUM_TOKENS = 1500
MOST_SECONDS = 200  # in which trials begin


def config(model: Path, deployment: dict[str, Any], **engine: Any) -> dict[str, Any]:
    served = {
        "model_loading_config": {"model_id": "tiny", "model_source": str(model)},
        "accelerator_config": {"kind": "cpu"},
        "engine_kwargs": ENGINE | engine,
        "deployment_config": {"health_check_period_s": 1} | deployment,
    }
    return {"llm_configs": [served], "ingress_deployment_config": {"num_replicas": 1}}


async def read(application: Application, number: int, begun: asyncio.Event) -> str:
    """→ how a long stream ended: "whole", "error event" or "broken"."""
    asked: Any = {"prompt": f"{number} dogs", "max_tokens": NUM_TOKENS, "extra_body": {"ignore_eos": True}}
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    num_tokens = 0
    async with application.async_client() as client:
        try:
            async for chunk in await client.completions.create(model="tiny", **options, **asked):
                begun.set()
                num_tokens = chunk.usage.completion_tokens if chunk.usage is not None else 0
        except openai.APIError as error:
            return "error event" if "replica that answered was lost" in str(error) else "broken"
    return "whole" if num_tokens == NUM_TOKENS else "broken"


def lose_a_replica(application: Application) -> tuple[list[str], float]:
    """→ how each stream ended, and seconds until two replicas answered again. Streams begin until both have some."""
    victim = application.replicas()[0]

    async def run() -> list[str]:
        tasks: list[asyncio.Task[str]] = []
        async with asyncio.timeout(60):
            while not tasks or not await both_compute(application):
                begun = [asyncio.Event() for _ in range(3)]
                tasks += [asyncio.create_task(read(application, len(tasks) + i, one)) for i, one in enumerate(begun)]
                await asyncio.gather(*(event.wait() for event in begun))
        victim.kill()
        return await asyncio.gather(*tasks)

    ends, start = asyncio.run(run()), time.monotonic()
    wait_until(lambda: both_answer(application), 120)
    return ends, time.monotonic() - start


async def both_compute(application: Application) -> bool:
    before = processor_times(application)
    await asyncio.sleep(0.3)
    return are_two_busier(before)


def processor_times(application: Application) -> dict[psutil.Process, float]:
    return {rank: sum(rank.cpu_times()[:2]) for rank in application.ranks()}


def are_two_busier(before: dict[psutil.Process, float]) -> bool:
    return sum(sum(rank.cpu_times()[:2]) > seconds + 0.03 for rank, seconds in before.items()) == 2


def both_answer(application: Application) -> bool:
    """Whether two replicas' ranks compute when eight requests come at once."""

    async def ask() -> None:
        async with application.async_client() as client:
            asked: Any = {"model": "tiny", "prompt": "one", "max_tokens": 100, "extra_body": {"ignore_eos": True}}
            await asyncio.gather(*(client.completions.create(**asked) for _ in range(8)))

    before = processor_times(application)
    asyncio.run(ask())
    return are_two_busier(before)


def answer(application: Application) -> str:
    body = {"prompt": "The quick brown fox", "temperature": 0, "max_tokens": 16}
    response = application.http.post("/v1/completions", json=body, timeout=120)
    return str(response.json()["choices"][0]["text"])


def kills(model: Path, trials: int) -> dict[str, Any]:
    with run_application(config(model, {"num_replicas": 2})) as application:
        wait_until(lambda: both_answer(application))
        expected, rows, limit = answer(application), [], time.monotonic() + MOST_SECONDS
        for _ in range(trials):
            if time.monotonic() > limit:
                break
            ends, seconds = lose_a_replica(application)
            after = all(answer(application) == expected for _ in range(4))
            counts = {kind: ends.count(kind) for kind in ("whole", "error event", "broken")}
            rows.append(counts | {"answers afterwards": after, "seconds until it is back": round(seconds, 1)})
            print(rows[-1], file=sys.stderr, flush=True)
    passed = all(
        row["answers afterwards"] and not row["broken"] and row["error event"] and row["whole"] for row in rows
    )
    return {"passed": passed and len(rows) > 0, "trials": rows}


def scaling(model: Path, trials: int) -> dict[str, Any]:
    """One to two replicas with the load, and back."""
    load = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2, "upscale_delay_s": 1}
    load |= {"downscale_delay_s": 3, "metrics_interval_s": 1, "look_back_period_s": 2}
    with run_application(config(model, {"autoscaling_config": load})) as application:

        async def busy() -> int:
            tasks: set[asyncio.Task[str]] = set()
            while len(application.ranks()) < 2:
                while len(tasks) < 8:
                    tasks.add(asyncio.create_task(read(application, len(tasks), asyncio.Event())))
                done, tasks = await asyncio.wait(tasks, timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
                assert all(one.result() == "whole" for one in done)
            ends = await asyncio.gather(*tasks)
            return ends.count("whole") - len(ends)

        start = time.monotonic()
        num_broken, up = -asyncio.run(asyncio.wait_for(busy(), 200)), time.monotonic() - start
        start = time.monotonic()
        wait_until(lambda: len(application.ranks()) == 1, 120)
        down = time.monotonic() - start
    return {"passed": num_broken == 0, "seconds up": round(up, 1), "seconds down": round(down, 1), "broken": num_broken}


def ranks(model: Path, trials: int) -> dict[str, Any]:
    """An engine whose two ranks Ray places; its replica is lost, and another comes."""
    expected = None
    for engine in ({}, {"prefill_context_parallel_size": 2, "distributed_executor_backend": "ray"}):
        with run_application(config(model, {"num_replicas": 1}, **engine)) as application:
            expected = expected or answer(application)
            equal, start = answer(application) == expected, time.monotonic()
            old = application.ranks()
            application.replicas()[0].kill()
            wait_until(lambda: not any(one.is_running() for one in old))  # noqa: B023
            gone, num_ranks = time.monotonic() - start, len(old)
            equal &= answer(application) == expected
            back = time.monotonic() - start
    figures = {"ranks": num_ranks, "ranks are gone, s": round(gone, 1), "answers again, s": round(back, 1)}
    return {"passed": equal and num_ranks == 2, **figures}


@contextmanager
def cluster(num_cpus: int) -> Iterator[dict[str, str]]:
    """Starts a Ray node by its command → the environment for commands that use it."""
    folder = tempfile.mkdtemp(prefix="tfserve", dir="/tmp")
    environment = (
        os.environ
        | ENVIRONMENT
        | {
            "RAY_ADDRESS": "127.0.0.1:6399",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "t" * 64,
            "PYTHONPATH": str(SOURCE),
        }
    )
    command = ["ray.scripts.scripts", "start", "--head", "--block", "--port=6399", f"--num-cpus={num_cpus}"]
    command += ["--include-dashboard=false", f"--temp-dir={folder}", "--object-store-memory=80000000"]
    node = subprocess.Popen(
        [sys.executable, "-m", *command, "--node-ip-address=127.0.0.1"], env=environment, stdout=sys.stderr
    )
    try:
        yield environment
    finally:
        for one in [*psutil.Process(node.pid).children(recursive=True), node]:
            with suppress(psutil.Error):
                one.kill()
        shutil.rmtree(folder, ignore_errors=True)


def command(model: Path, trials: int) -> dict[str, Any]:
    """`serve run examples/ray_serve/demo.yaml` of a user."""
    with cluster(4) as environment:
        wait_until(lambda: _is_open(6399))
        start = time.monotonic()
        served = subprocess.Popen(
            [sys.executable, "-m", "ray.serve.scripts", "run", str(DEMO)], env=environment, stdout=sys.stderr
        )
        client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none", max_retries=0, timeout=300)
        try:
            wait_until(lambda: served.poll() is not None or _is_there(client), 200)
            ready = time.monotonic() - start
            asked: Any = {"model": "demo", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
            text = client.completions.create(**asked).choices[0].text
            chat: Any = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
            chunks = list(client.chat.completions.create(stream=True, **chat))
        finally:
            served.terminate()
            with suppress(subprocess.TimeoutExpired):
                served.wait(30)
            served.kill()
    return {"passed": "Paris" in text and len(chunks) > 1, "ready after, s": round(ready, 1), "text": text}


def _is_open(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def _is_there(client: openai.OpenAI) -> bool:
    with suppress(openai.APIError, httpx.HTTPError):
        return bool(client.models.list().data)
    return False


def main() -> None:
    parser = arguments(__doc__)
    parts: dict[str, Callable[[Path, int], dict[str, Any]]] = {
        "kills": kills, "scaling": scaling, "ranks": ranks, "command": command,
    }  # fmt: skip
    parser.add_argument("part", choices=parts)
    parser.add_argument("--trials", type=int, default=10)
    args = parser.parse_args()
    args.model = "demo" if args.part == "command" else "tiny"
    with tempfile.TemporaryDirectory() as folder:
        result = parts[args.part](save_tiny_model(Path(folder)), args.trials)
    write(args, result)
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
