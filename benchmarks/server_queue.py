"""Send far more requests than may wait, over connections that stay open: each gets a 200 or a 429, none is reset.

python benchmarks/server_queue.py --model tiny -pcp 2 --longest 300 --requests 10000 --connections 500 --output-json F
"""

import asyncio
import json
import sys
import time
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

from server_common import Server, alone, arguments, requests, start, write


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], Any]:
    """→ status, headers and body of one answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
    return int(head[0].split()[1]), headers, json.loads(await reader.readexactly(int(headers["content-length"])))


async def flood(
    server: Server, bodies: list[dict[str, Any]], expected: list[list[str]], num_requests: int, num_connections: int
) -> Counter[str]:
    address, counts = urlsplit(server.url), Counter[str]()
    contents = [
        json.dumps({k: v for k, v in (body | body["extra_body"]).items() if k != "extra_body"}).encode()
        for body in bodies
    ]
    numbers = iter(range(num_requests))

    async def connection() -> None:
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        for number in numbers:  # shared by all connections
            content = contents[which := number % len(bodies)]
            head = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
            writer.write("\r\n".join([*head, f"Content-Length: {len(content)}", "", ""]).encode() + content)
            try:
                status, headers, body = await answer(reader)
            except (OSError, EOFError) as error:
                counts[f"lost: {error!r}"] += 1
                return
            counts[f"{status}"] += 1
            counts["wrong text"] += status == 200 and [one["text"] for one in body["choices"]] != expected[which]
            counts["429 without Retry-After"] += status == 429 and "retry-after" not in headers
        writer.close()

    await asyncio.gather(*(connection() for _ in range(num_connections)))
    return counts


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--connections", type=int, default=500)
    parser.add_argument("--queue", type=int, default=64)
    args = parser.parse_args()
    args.engine += f" --max-waiting-requests {args.queue}"
    bodies = requests(args, 32, most=16)
    with start(args) as server:
        expected = alone(server, bodies)
        begin = time.monotonic()
        counts = asyncio.run(flood(server, bodies, expected, args.requests, args.connections))
        seconds = time.monotonic() - begin
        server.assert_idle()
        tracebacks = server.log.read_text().count("Traceback")
    result = {"connections": args.connections, "queue": args.queue, "seconds": round(seconds, 1), "counts": counts}
    write(args, {"requests": args.requests, **result, "tracebacks": tracebacks})
    well = counts["200"] + counts["429"] == args.requests and counts["200"] and counts["429"]
    return 0 if well and not (counts["wrong text"] or counts["429 without Retry-After"] or tracebacks) else 1


if __name__ == "__main__":
    sys.exit(main())
