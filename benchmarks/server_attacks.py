"""Attack a server: bodies that are wrong or huge, what is not HTTP, connections that stay half open, and disconnects.

python benchmarks/server_attacks.py http://127.0.0.1:8000 --seconds 60

It prints how often each attack was made, and the statuses of the answers. It runs with the lowest priority, so that it
takes no time of the server on machines with few cores: the server's work for an attack is measured, not the attacker's.
"""

import asyncio
import json
import os
import random
import socket
import struct
import sys
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import server_common  # it makes the tests importable
from server_disconnects import visit
from test_server_connections import NO_HTTP
from test_server_refusals import BAD, RAW

PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
MESSAGE = {"role": "user", "content": "x"}
HUGE: list[dict[str, Any]] = [  # each a few MB of JSON that is cheap to send and long to check
    {"messages": [{}] * 400_000},
    {"messages": [MESSAGE] * 200_000},
    {"messages": [MESSAGE], **{f"unknown_{number}": 1 for number in range(200_000)}},
    {"messages": [MESSAGE], "stop_token_ids": [5] * 4_000_000},
    {"prompt": [[5]] * 1_000_000},
    {"prompt": "long " * 2_000_000},
]


def post(path: str, content: bytes) -> bytes:
    head = ["Host: x", "Content-Type: application/json", "Connection: close", f"Content-Length: {len(content)}"]
    return "\r\n".join([f"POST {path} HTTP/1.1", *head, "", ""]).encode() + content


WRONG = [json.dumps(body | wrong).encode() for body, wrong, _ in BAD] + RAW
LONG = [json.dumps({"model": "model", "max_tokens": 2} | body).encode() for body in HUGE]


class Attacker:
    """One of many: it attacks again and again, and waits for each answer."""

    def __init__(self, url: str, args: Namespace, number: int) -> None:
        self._rng = random.Random(args.seed + number)
        self._url, self._args = url, args
        self._bodies = server_common.requests(args, 64, most=16)

    async def attack(self, counts: Counter[str]) -> None:
        kinds = [self.wrong, self.huge, self.no_http, self.half_open, self.disconnect]
        [kind] = self._rng.choices(kinds, [8, 1, 4, 2, 4])
        counts[kind.__name__] += 1
        with suppress(OSError):  # the server may end the connection, and the attacker does
            counts[await kind()] += 1

    async def wrong(self) -> str:
        return await self._send(post(self._rng.choice(PATHS), self._rng.choice(WRONG)))

    async def huge(self) -> str:
        return await self._send(post(self._rng.choice(PATHS[:3]), self._rng.choice(LONG)))

    async def no_http(self) -> str:
        return await self._send(self._rng.choice(NO_HTTP))

    async def half_open(self) -> str:
        """Sends a part of a request, and nothing more for a while."""
        request = post(PATHS[0], self._rng.choice(WRONG))
        return await self._send(request[: self._rng.randrange(len(request))], self._rng.random())

    async def disconnect(self) -> str:
        body = {**self._rng.choice(self._bodies), "stream": self._rng.random() < 0.7}
        body |= body.pop("extra_body")
        await visit(self._url, body, self._rng, 0.3)
        return "disconnected"

    async def _send(self, request: bytes, patience: float = 60.0) -> str:
        """→ the status of the answer."""
        address = urlsplit(self._url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            writer.write(request)
            async with asyncio.timeout(patience):
                status = (await reader.readline())[9:12].decode() or "closed"
                await reader.read()
                return status
        except TimeoutError:
            return "no answer yet"
        finally:
            if self._rng.random() < 0.3:  # a reset instead of an orderly end
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.close()


async def attack(args: Namespace) -> Counter[str]:
    counts: Counter[str] = Counter()
    end = time.monotonic() + args.seconds

    async def repeat(number: int) -> None:
        attacker = Attacker(args.url, args, number)
        while time.monotonic() < end:
            await attacker.attack(counts)
            await asyncio.sleep(args.pause)

    await asyncio.gather(*(repeat(number) for number in range(args.attackers)))
    return counts


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--attackers", type=int, default=16)
    parser.add_argument("--pause", type=float, default=0.05, help="seconds between two attacks of one attacker")
    parser.add_argument("--longest", type=int, default=1500, help="characters of a prompt")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.nice(19)
    print(json.dumps(asyncio.run(attack(args))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
