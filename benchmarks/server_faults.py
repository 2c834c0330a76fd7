"""Kill, stop or exhaust ranks while streams run; check that every stream continues with the same text, and how soon.

python benchmarks/server_faults.py --model demo -pcp 2 --trials 20 --output-json F
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from itertools import cycle, islice, product
from typing import Any

import psutil
from server_common import Server, alone, arguments, requests, start, stream, write

FAULTS: dict[str, Callable[[Server, int], None]] = {
    "kill": lambda server, rank: server.ranks()[rank].send_signal(signal.SIGKILL),
    "stop": lambda server, rank: server.ranks()[rank].send_signal(signal.SIGSTOP),
    "oom": lambda server, rank: (server.faults / f"oom-{rank}").touch(),
}


async def trial(
    server: Server, bodies: list[dict[str, Any]], expected: list[str], fault: str, rank: int, phase: str
) -> dict[str, Any]:
    """Causes one fault while streams run.

    `recovered` is the time from the fault until new ranks run; `stalled` is the longest gap that a reader saw.
    """
    restarts = server.metric("rank_restarts_total")
    generated = server.metric("generation_tokens_total")
    async with server.async_client(timeout=600) as client:
        tasks = [asyncio.create_task(stream(client, body)) for body in bodies]
        enough = 0 if phase == "prefill" else 3 * len(bodies)
        while (
            server.metric("num_requests_running") == 0 or server.metric("generation_tokens_total") < generated + enough
        ):
            await asyncio.sleep(0.02)
        start = time.monotonic()
        FAULTS[fault](server, rank)
        noticed = None
        while server.metric("rank_restarts_total") == restarts:
            if noticed is None and server.health()[1] == "recovering":
                noticed = time.monotonic() - start
            await asyncio.sleep(0.02)
        recovered = time.monotonic() - start
        answers = await asyncio.gather(*tasks, return_exceptions=True)
    server.assert_idle()
    errors = [str(answer) for answer in answers if isinstance(answer, BaseException)]
    texts = [answer[0] for answer in answers if not isinstance(answer, BaseException)]
    return {
        "fault": f"{fault} of rank {rank} during {phase}",
        "identical": texts == expected,
        "errors": errors,
        "noticed_seconds": round(noticed or recovered, 2),
        "recovered_seconds": round(recovered, 2),
        "stalled_seconds": round(max(answer[2] for answer in answers if not isinstance(answer, BaseException)), 2),
    }


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--streams", type=int, default=8)
    args = parser.parse_args()
    bodies = requests(args, args.streams, most=128)
    for body in bodies:
        body["max_tokens"] = max(body["max_tokens"], 48)
    cases = list(islice(cycle(product(FAULTS, range(args.pcp), ("prefill", "decode"))), args.trials))
    with start(args, faulty=True) as server:
        expected = alone(server, bodies)
        trials = []
        for fault, rank, phase in cases:
            trials.append(asyncio.run(trial(server, bodies, expected, fault, rank, phase)))
            print(trials[-1], file=sys.stderr)
        ranks = server.ranks()
        os.kill(server.process.pid, signal.SIGKILL)
        _, orphans = psutil.wait_procs(ranks, timeout=5)
    times = sorted(one["recovered_seconds"] for one in trials)
    result = {
        "trials": len(trials),
        "identical": sum(one["identical"] for one in trials),
        "median_recovered_seconds": times[len(times) // 2],
        "max_recovered_seconds": times[-1],
        "max_noticed_seconds": max(one["noticed_seconds"] for one in trials),
        "orphans_after_kill_of_the_server": len(orphans),
        "each": trials,
    }
    write(args, result)
    return 0 if result["identical"] == len(trials) and not orphans else 1


if __name__ == "__main__":
    sys.exit(main())
