"""A client asks for 8 tokens every second: how long it waits while others attack the server, and while ranks are lost.

python benchmarks/server_paced.py --model tiny -pcp 2 --longest 1500 --output-json F

It asks on time, also while earlier requests wait. Under attack (server_attacks.py, with the lowest priority) 99 % of
the answers must take at most twice the quiet median and 200 ms, and none more than 2 s. While the ranks restart nobody
can be answered, so the times with faults are only reported; but all requests must be answered, with the same text.
"""

import asyncio
import json
import random
import signal
import sys
import time
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from server_common import Server, arguments, memory_mib, percentile, start, write

ATTACKS = Path(__file__).with_name("server_attacks.py")
BODY = {"model": "model", "prompt": "Is anybody there?", "max_tokens": 8, "temperature": 0.0}


async def ask(server: Server, seconds: float) -> dict[str, Any]:
    """Asks every second → the times of the answers, in milliseconds."""
    times, texts, failures = [], set(), list[str]()

    async def one(client: Any) -> None:
        begin = time.monotonic()
        try:
            answer = await client.completions.create(**BODY, extra_body={"ignore_eos": True})
        except Exception as error:
            failures.append(repr(error))
        else:
            texts.add(answer.choices[0].text)
        times.append(1000 * (time.monotonic() - begin))

    async with server.async_client() as client, asyncio.TaskGroup() as tasks:
        begin = time.monotonic()
        for number in range(int(seconds)):
            await asyncio.sleep(begin + number - time.monotonic())
            tasks.create_task(one(client))
    figures = {"median": percentile(times, 50), "99 %": percentile(times, 99), "longest": max(times)}
    result = {"requests": len(times), "failures": failures, "texts": len(texts)}
    return result | {f"{name}_ms": round(value, 1) for name, value in figures.items()}


@asynccontextmanager
async def attacked(server: Server, args: Namespace, seconds: float) -> AsyncIterator[dict[str, Any]]:
    """Attacks the server meanwhile → a dict that has the attackers' report afterwards."""
    flags = ["--seconds", f"{seconds}", "--longest", f"{args.longest}", "--attackers", f"{args.attackers}"]
    command = [sys.executable, str(ATTACKS), server.url, *flags, "--seed", f"{args.seed}"]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    await asyncio.sleep(args.settle)  # it makes its bodies
    report: dict[str, Any] = {}
    try:
        yield report
    finally:
        printed, _ = await process.communicate()
    report |= json.loads(printed)


async def lose_ranks(server: Server, args: Namespace) -> int:
    """Kills, stops and crashes ranks → how many."""
    rng, num_faults = random.Random(args.seed), 0
    begin = time.monotonic()
    while time.monotonic() < begin + args.seconds / 2 - args.fault_every:
        await asyncio.sleep(args.fault_every)
        ranks = await asyncio.to_thread(server.ranks)
        rng.choice(ranks).send_signal(rng.choice([signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV]))
        num_faults += 1
    return num_faults


async def trial(server: Server, args: Namespace) -> dict[str, Any]:
    quiet = await ask(server, args.seconds / 2)
    print(f"quiet: {quiet}", file=sys.stderr)
    async with attacked(server, args, args.seconds + args.settle) as report:
        attack = await ask(server, args.seconds)
    print(f"attacked: {attack} {report}", file=sys.stderr)
    async with attacked(server, args, args.seconds / 2 + args.settle) as more:
        num_faults, faults = await asyncio.gather(lose_ranks(server, args), ask(server, args.seconds / 2))
    print(f"attacked, with faults: {faults} {more}", file=sys.stderr)
    faults |= {"faults": num_faults}
    return {
        "quiet": quiet,
        "attacked": attack | {"attacks": report},
        "attacked_with_faults": faults | {"attacks": more},
    }


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="of the attack; quiet and with faults, half of it")
    parser.add_argument("--attackers", type=int, default=16)
    parser.add_argument("--settle", type=float, default=8.0, help="seconds until the attackers are at work")
    parser.add_argument("--fault-every", type=float, default=12.0, help="seconds")
    args = parser.parse_args()
    with start(args) as server:
        asyncio.run(ask(server, 3))
        before = memory_mib(server)
        result = asyncio.run(trial(server, args))
        server.assert_idle()
        result |= {"memory_mib": [before, memory_mib(server)], "tracebacks": server.log.read_text().count("Traceback")}
    quiet, attack, faults = result["quiet"], result["attacked"], result["attacked_with_faults"]
    allowed = round(2 * quiet["median_ms"] + 200, 1)
    ratio = round(attack["99 %_ms"] / allowed, 2)
    result = {"allowed_99_%_ms": allowed, "ratio_99_%": ratio, "ratio_longest": attack["longest_ms"] / 2000} | result
    write(args, result)
    well = not any(one["failures"] or one["texts"] != 1 for one in (quiet, attack, faults)) and not result["tracebacks"]
    return 0 if well and ratio <= 1 and attack["longest_ms"] <= 2000 else 1


if __name__ == "__main__":
    sys.exit(main())
