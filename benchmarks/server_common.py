"""Shared by the server's benchmarks: mixed requests, their reference answers, what a reader sees, and memory use."""

import contextlib
import json
import random
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import openai
import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "server"))

from running import Server, serve
from tiny import save_tiny_model

from twofold.bench.report import environment

__all__ = [
    "Reading",
    "Server",
    "alone",
    "arguments",
    "memory_mib",
    "percentile",
    "requests",
    "save_tiny_model",
    "serve",
    "start",
    "stream",
    "tiny_or",
    "write",
]

TEXT = (Path(__file__).parents[1] / "src" / "twofold" / "engine" / "scheduler.py").read_text()
SPECIAL: dict[int, dict[str, Any]] = {  # place in eight requests -> what it asks for besides
    0: {"frequency_penalty": 0.5, "presence_penalty": 0.5},
    1: {"stop": ["\n\n", "self."]},
    2: {"n": 2},
    3: {"extra_body": {"repetition_penalty": 1.2}},
    6: {"stop": ["dog", "request"]},
}


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
        with serve(tiny_or(args.model, folder), folder, *flags, faulty=faulty) as server:
            yield server


def tiny_or(model: str, folder: Path) -> str:
    """What to load for --model: the tiny one is written into `folder` first."""
    return str(save_tiny_model(folder / "model")) if model == "tiny" else model


def requests(args: Namespace, count: int, most: int = 96) -> list[dict[str, Any]]:
    """Requests with prompts of a few or many characters and answers of up to `most` tokens.

    Half are greedy and half are drawn with a seed. Of eight in a row, two have penalties, two have stop strings, and
    one asks for two answers.
    """
    rng = random.Random(args.seed)
    bodies = []
    for index in range(count):
        length = int(10 * (args.longest / 10) ** rng.random())
        start = rng.randrange(len(TEXT) - length)
        sampling = {"temperature": 0.0} if index % 2 else {"temperature": 0.8, "top_p": 0.95, "seed": index}
        body = {"model": "model", "prompt": TEXT[start : start + length], "max_tokens": rng.randint(4, most)}
        special = SPECIAL.get(index % 8, {})
        bodies.append(body | sampling | {"extra_body": {"ignore_eos": index % 4 == 0}} | special)
    return bodies


def alone(server: Server, bodies: list[dict[str, Any]]) -> list[list[str]]:
    """The answers to each request while no other request runs."""
    with server.client(timeout=600) as client:
        return [[choice.text for choice in client.completions.create(**body).choices] for body in bodies]


@dataclass
class Reading:
    """What a reader of a stream saw. Times are monotonic seconds: of the request, then of each chunk."""

    texts: list[str] = field(default_factory=list)
    num_tokens: int = 0
    times: list[float] = field(default_factory=lambda: [time.monotonic()])

    def gaps(self) -> Iterator[tuple[float, float]]:
        """Begin and end of each wait; the first one is for the first token."""
        return pairwise(self.times)


async def stream(client: openai.AsyncOpenAI, body: dict[str, Any]) -> Reading:
    """Reads a stream to its end."""
    reading = Reading([""] * body.get("n", 1))
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async for chunk in await client.completions.create(**body, **options):
        reading.times.append(time.monotonic())
        for choice in chunk.choices:
            reading.texts[choice.index] += choice.text
        if chunk.usage is not None:
            reading.num_tokens = chunk.usage.completion_tokens
    return reading


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that this share of all values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-len(ordered) * percent // 100) - 1)]


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
