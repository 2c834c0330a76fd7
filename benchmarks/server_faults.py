"""Kill, stop, crash or exhaust ranks while streams run; check that all streams go on with the same text, and how soon.

python benchmarks/server_faults.py --model tiny -pcp 2 --longest 1500 --faults 100 --output-json F

Clients stream one request after another. A trial causes one fault while they run; or a second one while the new ranks
load, or just when these begin to compute everything anew. A reader may have to wait for twice the ranks' restart and
one prefill of all streams, both measured on the idle server; for a second fault, that time once more.
"""

import asyncio
import random
import signal
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from itertools import cycle, product
from typing import Any

import psutil
from server_common import Reading, Server, alone, arguments, requests, start, stream, write


def _kill_all(server: Server) -> None:
    for rank in server.ranks():
        rank.kill()


FAULTS: dict[str, Callable[[Server, int], None]] = {
    "kill": lambda server, rank: server.ranks()[rank].send_signal(signal.SIGKILL),
    "kill all": lambda server, rank: _kill_all(server),
    "stop": lambda server, rank: server.ranks()[rank].send_signal(signal.SIGSTOP),
    "segmentation fault": lambda server, rank: server.ranks()[rank].send_signal(signal.SIGSEGV),
    "out of memory": lambda server, rank: (server.faults / f"oom-{rank}").touch(),  # in the next step
}
PHASES = ("running", "loading", "recovering")
SECONDS = 120  # after which a trial has not survived


class Readers:
    """Clients that stream one request after another until `stop` is set."""

    def __init__(self, server: Server, bodies: list[dict[str, Any]], expected: list[list[str]]) -> None:
        self._server, self._bodies, self._expected = server, bodies, expected
        self.readings: list[Reading] = []
        self.failures: list[str] = []
        self.last = [0.0] * len(bodies)  # when each reader last had news
        self.stop = threading.Event()

    async def run(self) -> None:
        async with self._server.async_client(timeout=600) as client:
            await asyncio.gather(*(self._read(client, number) for number in range(len(self._bodies))))

    async def _read(self, client: Any, number: int) -> None:
        for which in cycle([*range(number, len(self._bodies)), *range(number)]):
            if self.stop.is_set():
                return
            try:
                reading = await stream(client, self._bodies[which])
            except Exception as error:
                self.failures.append(f"request {which}: {error!r}")
                continue
            self.last[number] = time.monotonic()
            self.readings.append(reading)
            if reading.texts != self._expected[which]:
                self.failures.append(f"request {which}: {reading.texts} for {self._expected[which]}")


def replaced(server: Server, old: list[psutil.Process]) -> list[psutil.Process]:
    """Waits for other ranks than the old ones; they may still load."""
    server.wait_for(lambda: len(new := server.ranks()) == len(old) and not set(new) & set(old), SECONDS)
    return server.ranks()


def recovered(server: Server, old: list[psutil.Process]) -> float:
    """Waits for other ranks that have loaded the model → seconds that they took."""
    replaced(server, old)
    server.wait_for(lambda: server.health() == (200, "ok"), SECONDS)
    return server.metric("last_restart_seconds")


def baseline(server: Server, bodies: list[dict[str, Any]]) -> tuple[float, float]:
    """Seconds of a restart without requests, and until all of them have a token from ranks that know nothing."""
    restarts, prefills = [], []

    async def first_tokens() -> float:
        async with server.async_client(timeout=600) as client:
            readings = await asyncio.gather(*(stream(client, body) for body in bodies))
        return max(end - begin for begin, end in (next(reading.gaps()) for reading in readings))

    for _ in range(3):
        old = server.ranks()
        old[0].kill()
        restarts.append(recovered(server, old))
        prefills.append(asyncio.run(first_tokens()))
        server.assert_idle()
    return sorted(restarts)[1], sorted(prefills)[1]


def trial(server: Server, readers: Readers, kind: str, phase: str, rng: random.Random) -> dict[str, Any]:
    """Causes one fault or two; returns when every reader has come to the end of an answer after that."""
    time.sleep(0.5 + rng.random())
    begin, ranks = time.monotonic(), server.ranks()
    rank = rng.randrange(len(ranks))
    if phase != "running":
        ranks[rank].kill()
    if phase == "loading":
        ranks = replaced(server, ranks)
        time.sleep(rng.random() * server.metric("last_restart_seconds"))
    if phase == "recovering":
        recovered(server, ranks)
        ranks = server.ranks()
    FAULTS[kind](server, rank)
    restart, end = recovered(server, ranks), time.monotonic()
    server.wait_for(lambda: min(readers.last) > end, SECONDS)
    return {
        "fault": f"{kind}, rank {rank}, {phase}",
        "faults": 1 if phase == "running" else 2,
        "restart_seconds": round(restart, 2),
        "window": (begin, time.monotonic()),
    }


def trials(server: Server, readers: Readers, args: Namespace) -> list[dict[str, Any]]:
    """Causes faults of all kinds until there are enough of them, or until the streams do not go on."""
    rng, done = random.Random(args.seed), list[dict[str, Any]]()
    kinds = [(kind, phase) for kind, phase in product(FAULTS, PHASES) if (kind, phase) != ("out of memory", "loading")]
    try:
        for kind, phase in cycle(kinds):
            if sum(one["faults"] for one in done) >= args.faults:
                break
            before = len(readers.failures)
            done.append(trial(server, readers, kind, phase, rng))
            done[-1]["failures"] = readers.failures[before:]
            print({name: value for name, value in done[-1].items() if name != "window"}, file=sys.stderr)
    except AssertionError as error:
        print(f"not survived: {kind}, {phase}: {error}", file=sys.stderr)
        done.append({"fault": f"{kind}, {phase}", "faults": 1, "failures": ["not survived"]})
    finally:
        readers.stop.set()
    return done


def longest_gaps(readings: list[Reading], window: tuple[float, float]) -> tuple[float, float]:
    """Seconds that a reader waited for its next token, and for its first token, at a time in the window."""
    begin, end = window
    longest = [0.0, 0.0]
    for reading in readings:
        for number, (before, after) in enumerate(reading.gaps()):
            if before < end and after > begin:
                longest[number == 0] = max(longest[number == 0], after - before)
    return longest[0], longest[1]


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--streams", type=int, default=24)
    args = parser.parse_args()
    bodies = requests(args, args.streams)

    async def run(server: Server, readers: Readers) -> list[dict[str, Any]]:
        _, done = await asyncio.gather(readers.run(), asyncio.to_thread(trials, server, readers, args))
        return done

    with start(args, faulty=True) as server:
        expected = alone(server, bodies)
        restart, prefill = baseline(server, bodies)
        readers = Readers(server, bodies, expected)
        done = asyncio.run(run(server, readers))
        server.assert_idle()
        ranks = server.ranks()
        server.process.kill()
        _, orphans = psutil.wait_procs(ranks, timeout=5)
    bar = 2 * restart + prefill
    for one in done:
        gap, wait = longest_gaps(readers.readings, one.pop("window", (0.0, 0.0)))
        one |= {"stalled_seconds": round(gap, 2), "first_token_seconds": round(wait, 2)}
        one["ratio"] = round(gap / bar / one["faults"], 2)
    result = {
        "faults": sum(one["faults"] for one in done),
        "survived": sum(one["faults"] for one in done if "restart_seconds" in one),
        "answers": len(readers.readings),
        "failures": readers.failures,
        "orphans_after_kill_of_the_server": len(orphans),
        "idle_restart_seconds": round(restart, 2),
        "prefill_seconds": round(prefill, 2),
        "allowed_seconds_a_fault": round(bar, 2),
        "longest_ratio_one_fault": max(one["ratio"] for one in done if one["faults"] == 1),
        "longest_ratio_two_faults": max((one["ratio"] for one in done if one["faults"] == 2), default=None),
        "each": done,
    }
    write(args, result)
    well = result["survived"] == result["faults"] and not readers.failures and not orphans
    return 0 if well and all(one["ratio"] <= 1 for one in done) else 1


if __name__ == "__main__":
    sys.exit(main())
