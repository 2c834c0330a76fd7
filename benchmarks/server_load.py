"""Run many streams at once; check that each gets the answer that it gets alone, and how much memory use grows.

python benchmarks/server_load.py --model demo -pcp 2 --streams 64 --seconds 60 --rounds 10 --output-json F
"""

import asyncio
import sys
import time
from typing import Any

from server_common import Server, alone, arguments, memory_mib, requests, start, stream, write


async def one_round(
    server: Server, bodies: list[dict[str, Any]], expected: list[list[str]], num_streams: int, seconds: float
) -> dict[str, Any]:
    """`num_streams` clients send one request after another for `seconds`, and read each answer to its end."""
    start = time.monotonic()
    counts = {"answers": 0, "wrong": 0, "failed": 0, "tokens": 0}

    async def client_loop(number: int) -> None:
        turn = number
        while time.monotonic() < start + seconds:
            which = turn % len(bodies)
            turn += 7
            try:
                reading = await stream(client, bodies[which])
            except Exception as error:
                counts["failed"] += 1
                print(f"failed: {error}", file=sys.stderr)
                continue
            counts["answers"] += 1
            counts["tokens"] += reading.num_tokens
            if reading.texts != expected[which]:
                counts["wrong"] += 1
                print(f"wrong: request {which}: {reading.texts} for {expected[which]}", file=sys.stderr)

    async with server.async_client(timeout=600) as client:
        await asyncio.gather(*(client_loop(number) for number in range(num_streams)))
    elapsed = time.monotonic() - start
    server.assert_idle()
    return counts | {"seconds": round(elapsed, 1), "tokens_per_second": round(counts["tokens"] / elapsed, 1)}


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--requests", type=int, default=32, help="different ones")
    args = parser.parse_args()
    bodies = requests(args, args.requests)
    with start(args) as server:
        expected = alone(server, bodies)
        rounds = []
        for number in range(args.rounds):
            one = asyncio.run(one_round(server, bodies, expected, args.streams, args.seconds))
            rounds.append(one | {"memory_mib": memory_mib(server)})
            print(f"round {number + 1}: {rounds[-1]}", file=sys.stderr)
    first, last = rounds[min(1, len(rounds) - 1)]["memory_mib"], rounds[-1]["memory_mib"]
    total = {name: sum(one[name] for one in rounds) for name in ("answers", "wrong", "failed", "tokens")}
    growth = {name: round(last[name] - first[name], 1) for name in last}
    write(args, {"streams": args.streams, **total, "growth_mib_after_first_round": growth, "rounds": rounds})
    return 1 if total["wrong"] or total["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
