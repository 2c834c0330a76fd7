"""Let clients disconnect at random moments and in various ways, and check that the server keeps nothing of them.

python benchmarks/server_disconnects.py --model demo -pcp 2 --clients 1000 --rounds 3 --output-json F
"""

import asyncio
import json
import random
import socket
import struct
import sys
from argparse import Namespace
from typing import Any

import psutil
from server_common import Server, arguments, memory_mib, requests, start, write


async def visit(url: str, body: dict[str, Any], rng: random.Random, patience: float) -> str:
    """Sends all or a part of a request, may read some of the answer, and disconnects, with or without a reset."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    content = json.dumps(body).encode()
    head = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
    whole = "\r\n".join([*head, f"Content-Length: {len(content)}", "", ""]).encode() + content
    cut = rng.random() < 0.1
    writer.write(whole[: rng.randrange(len(whole))] if cut else whole)
    stay = rng.expovariate(1 / patience)
    try:
        async with asyncio.timeout(stay):
            while rng.random() < 0.98 and await reader.read(512):
                pass
    except TimeoutError:
        pass
    if rng.random() < 0.3:  # a reset instead of an orderly end
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()
    return "in the middle of the request" if cut else "later"


async def visit_all(server: Server, args: Namespace, rng: random.Random, num_clients: int) -> dict[str, int]:
    bodies = requests(args, 64)
    gate = asyncio.Semaphore(args.at_once)
    left: dict[str, int] = {}

    async def one() -> None:
        async with gate:
            body = {**rng.choice(bodies), "stream": rng.random() < 0.7}
            body |= body.pop("extra_body")
            when = await visit(server.url, body, rng, args.patience)
            left[when] = left.get(when, 0) + 1

    await asyncio.gather(*(one() for _ in range(num_clients)))
    return left


def state(server: Server) -> dict[str, Any]:
    process = psutil.Process(server.process.pid)
    return {"fds": process.num_fds(), "threads": process.num_threads(), "memory_mib": memory_mib(server)}


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--clients", type=int, default=1000, help="of each round")
    parser.add_argument("--rounds", type=int, default=3, help="after one that warms up, a tenth as long")
    parser.add_argument("--at-once", type=int, default=100)
    parser.add_argument("--patience", type=float, default=1.0, help="seconds that a client stays, on average")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with start(args) as server:
        rounds = []
        for number in range(args.rounds + 1):
            left = asyncio.run(visit_all(server, args, rng, args.clients if number else max(args.clients // 10, 10)))
            server.assert_idle()
            rounds.append({"left": left, **state(server)})
            print(f"round {number}: {rounds[-1]}", file=sys.stderr)
        with server.client() as client:
            client.completions.create(model="model", prompt="Still there?", max_tokens=4)
    first, last = rounds[0], rounds[-1]
    write(args, {"clients": args.rounds * args.clients, "rounds": rounds})
    return 0 if last["fds"] <= first["fds"] + 2 and last["threads"] <= first["threads"] else 1


if __name__ == "__main__":
    sys.exit(main())
