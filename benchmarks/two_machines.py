"""Ranks on two machines: network namespaces of this one with a link between them, and a Ray node in each. Needs root.

    python benchmarks/two_machines.py answers                   two machines against one rank
    python benchmarks/two_machines.py traffic                   bytes on the link against the size of KV entries
    python benchmarks/two_machines.py ttft --gbps 10 2          over slow links against two ranks of one machine
    python benchmarks/two_machines.py faults --fault rank       trials of one fault: rank, raylet, link, node, head

The link has a rate (tc tbf) but no delay beyond the kernel's, unless --delay-ms is given and the kernel has netem.
Bytes are those that the link's device counts, with all headers. Ray counts a node as lost after 9 s (`SETTINGS` in
tests/clusters.py), not after 25. Trials of faults and links are added to those that the output has already, so
that they can be run in parts.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from clusters import Machines, run, two_machines

from twofold import LLM, SamplingParams
from twofold.bench.report import bytes_per_token, environment
from twofold.models.sizes import model_shape
from twofold.planning.processors import KNOWN, Link
from twofold.planning.shape import ModelShape
from twofold.planning.times import Setup, TimeModel

LINK_DOWN_SECONDS = 5.0
DISTURBED = 0.03  # of the cores, by other processes
NUM_TOKENS = {"raylet": 100, "head": 200}  # of each stream, else 32: these faults end ranks some seconds later


def start(args: argparse.Namespace, num_ranks: int = 2, backend: str = "ray") -> LLM:
    return LLM(
        args.model,
        prefill_context_parallel_size=num_ranks,
        distributed_executor_backend=backend,
        dtype=args.dtype,
        step_layout=args.step_layout,
        enable_prefix_caching=False,
    )


def prompts(num_prompts: int, num_tokens: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(num_tokens)
    return [{"prompt_token_ids": rng.integers(100, 40_000, num_tokens).tolist()} for _ in range(num_prompts)]


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


def answers(llm: LLM) -> list[list[int]]:
    asked = [*prompts(2, 32), *prompts(2, 700), *prompts(1, 2048)]
    return [output.outputs[0].token_ids for output in llm.generate(asked, greedy(32), use_tqdm=False)]


def compare_answers(args: argparse.Namespace, machines: Machines) -> dict[str, Any]:
    with start(args, 1, "mp") as llm:
        expected = answers(llm)
    with start(args) as llm:
        found = answers(llm)
    return {"answers": len(found), "equal to those of one rank": sum(map(list.__eq__, found, expected))}


def traffic(args: argparse.Namespace, machines: Machines) -> dict[str, Any]:
    """Of prompts that are computed at once, with one token of an answer."""
    with start(args) as llm:
        entry = bytes_per_token(llm.engine)["stored"]
        rows = []
        for num_tokens in (1024, 2048, 4096):
            counts = []
            for prompt in prompts(args.repeats, num_tokens):
                before = machines.num_link_bytes()
                llm.generate([prompt], greedy(1), use_tqdm=False)
                counts.append((machines.num_link_bytes() - before) / num_tokens)
            rows.append(
                {
                    "prompt tokens": num_tokens,
                    "link bytes a token": round(median(counts)),
                    "to KV entries of all layers": round(median(counts) / entry, 3),
                }
            )
        return {"KV entries of all layers, bytes a token": entry, "MTU": machines.mtu, "rows": rows}


def ttft(args: argparse.Namespace, machines: Machines) -> dict[str, Any]:
    """The same prompts in turn on two machines and on one, with as many threads; medians of pairs.

    *planned* is one machine's time, and what the model of time says that a link of this rate adds. A pair during which
    other processes took more than `DISTURBED` of the cores is left out.
    """
    rows = {row["link Gbit/s"]: row for row in earlier(args).get("rows", [])}
    with start(args) as far, start(args, backend="mp") as near:
        llms, shape = {"two machines": far, "one machine": near}, shape_of(far)
        own = [psutil.Process(), *psutil.Process().children(recursive=True)]
        own += [*machines.processes(0), *machines.processes(1)]
        for gbps in args.gbps:
            slow_down(machines, gbps, args.delay_ms)
            reached, pairs, num_tries = raw_gbps(machines), [], 0
            for index, prompt in enumerate(prompts(4 * args.repeats, args.tokens)):
                begin, others = time.perf_counter(), seconds_of_others(own)
                pair = {name: timed(llm, prompt) for name, llm in llms.items()}
                share = (seconds_of_others(own) - others) / (time.perf_counter() - begin) / psutil.cpu_count()
                num_tries += index > 0
                if index and share < DISTURBED:
                    pairs.append(pair)
                if len(pairs) == args.repeats:
                    break
            if not pairs:
                print(f"{gbps} Gbit/s: other processes disturbed all {num_tries} pairs", file=sys.stderr)
                continue
            two, one = (np.array([pair[name] for pair in pairs]) for name in llms)  # [pairs, (TTFT, exchange)]
            link = planned_ms(shape, args.tokens, Link(gbps)) - planned_ms(shape, args.tokens, None)
            (two_ms, two_exchange), (one_ms, one_exchange) = (np.median(times, axis=0) for times in (two, one))
            rows[gbps] = {
                "link Gbit/s": gbps,
                "of one TCP stream": round(reached, 2),
                "pairs": len(pairs),
                "pairs left out": num_tries - len(pairs),
                "one machine ms": round(one_ms, 1),
                "two machines ms": round(two_ms, 1),
                "two machines to one": round(float(np.median(two[:, 0] / one[:, 0])), 3),
                "planned ms": round(one_ms + link, 1),
                "measured to planned": round(two_ms / (one_ms + link), 3),
                "of the link, planned ms": round(link, 1),
                "of the link, measured ms": round(float(np.median(two[:, 0] - one[:, 0])), 1),
                "exchange of one machine ms": round(one_exchange, 1),
                "exchange of two machines ms": round(two_exchange, 1),
                "each": {"two machines": two[:, 0].round(1).tolist(), "one machine": one[:, 0].round(1).tolist()},
                "commit": environment()["commit"],
            }
            print(rows[gbps], file=sys.stderr, flush=True)
    measured = {
        "tokens": args.tokens,
        "dtype": args.dtype,
        "step_layout": args.step_layout,
        "link delay ms": args.delay_ms,
    }
    return measured | {"rows": sorted(rows.values(), key=lambda row: -row["link Gbit/s"])}


def timed(llm: LLM, prompt: dict[str, Any]) -> tuple[float, float]:
    """→ milliseconds to the first token, and those of the exchange, waits for the slower rank included."""
    begin, before = time.perf_counter(), llm.engine.stats.exchange_seconds
    llm.generate([prompt], greedy(1), use_tqdm=False)
    return 1e3 * (time.perf_counter() - begin), 1e3 * (llm.engine.stats.exchange_seconds - before)


def seconds_of_others(own: list[psutil.Process]) -> float:
    """That processes besides `own` have computed on this machine so far."""
    times = psutil.cpu_times()
    mine = sum(sum(process.cpu_times()[:2]) for process in own if process.is_running())
    return float(times.user + times.nice + times.system - mine)


def shape_of(llm: LLM) -> ModelShape:
    return model_shape(llm.engine.runtime.model_config, llm.engine.runtime.dtype)


def planned_ms(shape: ModelShape, num_tokens: int, link: Link | None) -> float:
    """Of two ranks on two nodes; without a link on one. By what processor does not change what a link adds."""
    setup = Setup(2, num_nodes=1 if link is None else 2, link=link, step_layout="tokens")
    return 1e3 * TimeModel(shape, KNOWN["h200"], setup).ttft(num_tokens)


def raw_gbps(machines: Machines, num_bytes: int = 1 << 27) -> float:
    """What one TCP stream reaches on the link, from machine 1 to this one."""
    code = "import socket, sys; s = socket.create_connection((sys.argv[1], int(sys.argv[2]))); "
    code += "s.sendall(bytes(int(sys.argv[3])))"
    with socket.create_server((machines.addresses[0], 0)) as server:
        to = [*server.getsockname(), num_bytes]
        sender = subprocess.Popen([*machines.enter(1), sys.executable, "-c", code, *map(str, to)])
        connection, _ = server.accept()
        with connection:
            begin, left, buffer = time.perf_counter(), num_bytes, bytearray(1 << 20)
            while left:
                left -= connection.recv_into(buffer)
        sender.wait()
    return num_bytes * 8e-9 / (time.perf_counter() - begin)


def slow_down(machines: Machines, gbps: float, delay_ms: float) -> None:
    """Each way. What passes at once (burst) is little beside a layer's entries (1.6 MB a rank for 2,048 tokens of the
    demo model), or these would not be slowed down; but it holds one of the kernel's largest packets, which would be cut
    by software else: a stream then reached 6.8 Gbit/s of 10, not 7.7, with more of the cores' time.
    """
    for i in range(2):
        tc = [*machines.enter(i), "tc", "qdisc", "replace", "dev", machines.device(i)]
        if delay_ms:
            run(*tc, "root", "handle", "1:", "netem", "delay", f"{delay_ms}ms", "limit", "100000")
            tc += ["parent", "1:"]
        else:
            tc += ["root"]
        run(*tc, "tbf", "rate", f"{gbps}gbit", "burst", "128kb", "latency", "100ms")


def faults(args: argparse.Namespace, machines: Machines) -> dict[str, Any]:
    """Streams run while the fault comes; they must be what they are without one."""
    record = earlier(args)
    each = record.get(args.fault, {}).get("each", [])
    num_trials, end = len(each) + args.trials, time.monotonic() + args.seconds
    with start(args) as llm:
        num_tokens = NUM_TOKENS.get(args.fault, 32)
        expected, seconds = stream(llm, num_tokens, 0, lambda: None)
        while len(each) < num_trials and time.monotonic() < end:
            rng, restarts = random.Random(f"{args.fault} {len(each)}"), llm.engine.stats.num_restarts
            due = rng.randrange(32 * len(expected) * 3 // 4)
            found, took = stream(llm, num_tokens, due, partial(FAULTS[args.fault], machines, rng))
            num_restarts = llm.engine.stats.num_restarts - restarts
            one = {
                "unchanged": sum(map(list.__eq__, found, expected)),
                "tokens before": due,
                "seconds": round(took - seconds, 1),
                "new ranks": num_restarts,
                "commit": environment()["commit"],
            }
            print(len(each), one, file=sys.stderr, flush=True)
            each.append(one)
            record[args.fault] = {
                "trials": len(each),
                "streams a trial": len(expected),
                "trials with all streams unchanged": sum(one["unchanged"] == len(expected) for one in each),
                "seconds more, median": median(one["seconds"] for one in each),
                "seconds more, most": max(one["seconds"] for one in each),
                "new ranks, in all": sum(one["new ranks"] for one in each),
                "each": each,
                "environment": environment(),
            }
            write(args, record)  # what comes later may be cut off
    return record


def stream(llm: LLM, num_tokens: int, due: int, cause: Callable[[], object]) -> tuple[list[list[int]], float]:
    """Answers to four prompts → their tokens, and seconds. The fault comes while a step runs, after `due` tokens."""
    begin, found = time.monotonic(), dict[str, list[int]]()
    fault = threading.Thread(target=cause)
    for number, prompt in enumerate([*prompts(2, 40), *prompts(2, 600)]):
        llm.engine.add_request(f"{number}", prompt, greedy(num_tokens))
    while llm.engine.has_work:
        if not fault.ident and sum(map(len, found.values())) >= due:
            fault.start()
        for output in llm.engine.step_or_recover():
            found[output.request_id] = output.outputs[0].token_ids
    fault.join()
    return [found[name] for name in sorted(found)], time.monotonic() - begin


def kill_rank(machines: Machines, rng: random.Random) -> None:
    machines.ranks(rng.randrange(2))[0].kill()


def kill_raylet(machines: Machines, rng: random.Random) -> None:
    """Its workers and ranks end with it; then it is started again."""
    lost = machines.ranks(1)
    machines.kill(1, "raylet")
    psutil.wait_procs(lost, timeout=120)
    machines.kill(1)
    machines.start_node(1)


def cut_link(machines: Machines, rng: random.Random) -> None:
    machines.set_link(False)
    time.sleep(LINK_DOWN_SECONDS)
    machines.set_link(True)


def lose_node(machines: Machines, rng: random.Random) -> None:
    """Its link is cut for good; a node with another address takes its place when its ranks have ended."""
    lost = machines.ranks(1)
    machines.set_link(False)
    psutil.wait_procs(lost, timeout=120)
    machines.kill(1)
    addresses = {f"10.91.0.{number}" for number in range(2, 200)} - {machines.addresses[1]}
    machines.move(1, rng.choice(sorted(addresses)))
    machines.set_link(True)
    machines.start_node(1)


def lose_head(machines: Machines, rng: random.Random) -> None:
    """Ray's head is killed, and its nodes and ranks end; then another cluster starts at the same address."""
    lost = [*machines.ranks(0), *machines.ranks(1)]
    machines.kill(0, "gcs_server")
    psutil.wait_procs(lost, timeout=120)
    for machine in range(2):
        machines.kill(machine)
    for machine in range(2):
        machines.start_node(machine)


FAULTS = {"rank": kill_rank, "raylet": kill_raylet, "link": cut_link, "node": lose_node, "head": lose_head}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("answers", "traffic", "ttft", "faults"))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--step-layout", default="auto")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gbps", type=float, nargs="+", default=[10.0])
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--mtu", type=int, default=9000)
    parser.add_argument("--fault", choices=FAULTS, default="rank")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=1e6, help="after which no trial begins")
    parser.add_argument("--output-json", type=Path)
    args = parser.parse_args()
    measure = {"answers": compare_answers, "traffic": traffic, "ttft": ttft, "faults": faults}[args.what]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leaves no namespaces
    with two_machines(f"tf{os.getpid() % 10000}n", mtu=args.mtu, with_namespaces=True) as machines:
        os.environ.update(machines.environment | {"RAY_ADDRESS": machines.ray_address})
        with machines.inside():
            result = measure(args, machines)
    if args.what != "faults":
        result |= {"environment": environment()}
    write(args, result)
    print(json.dumps(short(result), indent=1))


def earlier(args: argparse.Namespace) -> dict[str, Any]:
    """What the output has already."""
    found: dict[str, Any] = {}
    if args.output_json and args.output_json.exists():
        found = json.loads(args.output_json.read_text())
    return found


def write(args: argparse.Namespace, result: dict[str, Any]) -> None:
    if args.output_json:
        args.output_json.write_text(json.dumps(result, indent=1) + "\n")


def short(result: dict[str, Any]) -> dict[str, Any]:
    """Without single trials and the environment."""
    return {
        name: short(value) if isinstance(value, dict) else value
        for name, value in result.items()
        if name not in ("each", "environment")
    }


if __name__ == "__main__":
    main()
