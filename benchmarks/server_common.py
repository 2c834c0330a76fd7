"""Shared by the server's benchmarks: requests of mixed lengths, their reference answers, and memory use."""

import asyncio
import contextlib
import json
import random
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "server"))

from running import Server, serve
from tiny import save_tiny_model

from twofold.bench.report import environment

__all__ = ["Server", "alone", "arguments", "memory_mib", "requests", "start", "stream", "write"]

TEXT = (Path(__file__).parents[1] / "src" / "twofold" / "engine" / "scheduler.py").read_text()


def arguments(description: str | None) -> ArgumentParser:
    parser = ArgumentParser(description=description)
    parser.add_argument("--model", default="demo", help="tiny is the tests' own: two layers of random weights")
    parser.add_argument("-pcp", type=int, default=2)
    parser.add_argument("--engine", default="", help="further flags of twofold serve, in one string")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=int, default=3000, help="characters of a prompt")
    parser.add_argument("--output-json")
    return parser


@contextlib.contextmanager
def start(args: Namespace, faulty: bool = False) -> Iterator[Server]:
    """Runs the server that the arguments describe. Its files are removed when it ends."""
    flags = ["-pcp", str(args.pcp), "--served-model-name", "model", *args.engine.split()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save_tiny_model(folder / "model") if args.model == "tiny" else args.model
        with serve(model, folder, *flags, faulty=faulty) as server:
            yield server


def requests(args: Namespace, count: int, most: int = 96) -> list[dict[str, Any]]:
    """Requests with prompts of a few or many characters and answers of up to `most` tokens, greedy or sampled."""
    rng = random.Random(args.seed)
    bodies = []
    for index in range(count):
        length = int(10 * (args.longest / 10) ** rng.random())
        start = rng.randrange(len(TEXT) - length)
        sampling = {"temperature": 0.0} if index % 2 else {"temperature": 0.8, "top_p": 0.95, "seed": index}
        body = {"model": "model", "prompt": TEXT[start : start + length], "max_tokens": rng.randint(4, most)}
        bodies.append(body | sampling | {"extra_body": {"ignore_eos": index % 4 == 0}})
    return bodies


def alone(server: Server, bodies: list[dict[str, Any]]) -> list[str]:
    """The answer to each request while no other request runs."""
    with server.client() as client:
        return [client.completions.create(**body).choices[0].text for body in bodies]


async def stream(client: openai.AsyncOpenAI, body: dict[str, Any]) -> tuple[str, int, float]:
    """Returns the streamed text, its number of tokens, and the longest time between two chunks in seconds."""
    loop = asyncio.get_running_loop()
    text, num_tokens, longest, last = "", 0, 0.0, None
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async for chunk in await client.completions.create(**body, **options):
        now = loop.time()
        longest = max(longest, 0.0 if last is None else now - last)
        last = now
        if chunk.choices:
            text += chunk.choices[0].text
        if chunk.usage is not None:
            num_tokens = chunk.usage.completion_tokens
    return text, num_tokens, longest


def memory_mib(server: Server) -> dict[str, float]:
    """Unshared memory in MiB: of the server's process, and of all its ranks together."""
    own = {"server": psutil.Process(server.process.pid).memory_full_info().uss}
    own["ranks"] = sum(rank.memory_full_info().uss for rank in server.ranks())
    return {name: round(size / 2**20, 1) for name, size in own.items()}


def write(args: Namespace, result: dict[str, Any]) -> None:
    print(json.dumps(result, indent=1))
    if args.output_json:
        whole = environment() | {"model": args.model, **result}
        Path(args.output_json).write_text(json.dumps(whole, indent=1) + "\n")
