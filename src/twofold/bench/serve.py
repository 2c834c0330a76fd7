"""a running server under load: throughput, time to first token, time per token

Measures any OpenAI-compatible server. Flags, report and JSON are those of `vllm bench serve`. Prompts are random token
ids (for chats, random text), or come from a file: --dataset-name custom reads lines of JSON with a "prompt" in each,
sharegpt the JSON of that data set. With --dataset-name conversations some users begin with the same system prompt, and
each turn is all that was said before, the server's answer, and new text.
"""

import asyncio
import json
import math
import sys
import time
from argparse import ArgumentParser, Namespace, _ArgumentGroup
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from twofold.bench.prompts import Prompt, make_prompts
from twofold.bench.report import print_table
from twofold.errors import ConfigError, EngineError
from twofold.flags import whole_number

if TYPE_CHECKING:
    import httpx
    from transformers import PreTrainedTokenizerBase

ENDPOINTS = {"openai": "/v1/completions", "vllm": "/v1/completions", "openai-chat": "/v1/chat/completions"}
DATASETS = ("random", "conversations", "custom", "sharegpt")
POSITIVE = (
    *("num_prompts", "num_conversations", "num_turns", "num_shared_prefixes", "turn_len", "output_len"),
    *("request_rate", "burstiness"),
)
METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}


@dataclass(slots=True)
class Outcome:
    """A request and its answer. Times are in seconds."""

    prompt_len: int
    turn: int = 1  # of its conversation
    cached_len: int | None = None  # tokens of the prompt that were in the prefix cache, if the server tells
    start: float = 0.0  # since the start of the run
    success: bool = False
    ttft: float = 0.0
    latency: float = 0.0
    itl: list[float] = field(default_factory=list)
    num_tokens: int = 0
    text: str = ""
    error: str = ""

    @property
    def tpot(self) -> float:
        return (self.latency - self.ttft) / (self.num_tokens - 1) if self.num_tokens > 1 else 0.0


def configure(parser: ArgumentParser) -> None:
    _add_server(parser.add_argument_group("server"))
    _add_prompts(parser.add_argument_group("prompts"))
    _add_conversations(parser.add_argument_group("conversations (--dataset-name conversations)"))
    _add_load(parser.add_argument_group("load"))
    _add_result(parser.add_argument_group("result"))


def _add_server(group: _ArgumentGroup) -> None:
    group.add_argument("--backend", default="openai", choices=ENDPOINTS, help="kind of requests (default: openai)")
    group.add_argument("--base-url", help="address of the server, instead of --host and --port")
    group.add_argument("--host", default="127.0.0.1", help="(default: %(default)s)")
    group.add_argument("--port", type=whole_number, default=8000, metavar="N", help="(default: %(default)s)")
    group.add_argument("--endpoint", help="path of the requests (default: that of the backend)")
    group.add_argument("--api-key", help="key that the server asks for")
    group.add_argument("--model", help="name of the model (default: the first that the server lists)")
    group.add_argument("--tokenizer", help="directory or hub name (default: the model)")


def _add_prompts(group: _ArgumentGroup) -> None:
    group.add_argument("--dataset-name", default="random", choices=DATASETS, help="(default: random)")
    group.add_argument("--dataset-path", metavar="FILE", help="file of the prompts, if they are not random")
    group.add_argument(
        "--num-prompts", type=whole_number, default=1000, metavar="N", help="number of prompts (default: 1000)"
    )
    group.add_argument(
        "--random-input-len",
        type=whole_number,
        default=1024,
        metavar="N",
        help="tokens in a random prompt (default: 1024)",
    )
    group.add_argument(
        "--random-output-len", type=whole_number, default=128, metavar="N", help="tokens in its answer (default: 128)"
    )
    group.add_argument(
        "--random-range-ratio", type=float, default=0.0, metavar="X", help="random lengths vary by this share, 0 to 1"
    )
    group.add_argument(
        "--random-prefix-len",
        type=whole_number,
        default=0,
        metavar="N",
        help="tokens that all random prompts begin with",
    )
    group.add_argument(
        "--custom-output-len", type=whole_number, default=256, metavar="N", help="tokens in an answer (default: 256)"
    )
    group.add_argument(
        "--sharegpt-output-len",
        type=whole_number,
        metavar="N",
        help="tokens in an answer (default: as in the data set)",
    )


def _add_conversations(group: _ArgumentGroup) -> None:
    for flag, default, text in (
        ("--num-conversations", 8, "number of conversations, in place of --num-prompts"),
        ("--num-turns", 4, "requests of each, one after the other"),
        ("--shared-prefix-len", 2048, "tokens in a system prompt that conversations share"),
        ("--num-shared-prefixes", 1, "different ones, in turn"),
        ("--prefix-len", 0, "tokens of its own that a conversation begins with, such as a document"),
        ("--turn-len", 128, "new tokens in each turn"),
        ("--output-len", 64, "tokens in each answer"),
    ):
        group.add_argument(flag, type=whole_number, default=default, metavar="N", help=f"{text} (default: {default})")
    group.add_argument(
        "--think-time",
        type=float,
        default=0.0,
        metavar="X",
        help="seconds between an answer and the next turn (default: 0)",
    )


def _add_load(group: _ArgumentGroup) -> None:
    group.add_argument(
        "--request-rate", type=float, default=math.inf, metavar="X", help="requests per second (default: all at once)"
    )
    group.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="X",
        help="1 is a Poisson process, less comes in bursts (default: 1)",
    )
    group.add_argument(
        "--max-concurrency",
        type=whole_number,
        metavar="N",
        help="requests that run at the same time (default: no limit)",
    )
    group.add_argument("--ignore-eos", action="store_true", help="do not end answers before their length")
    group.add_argument("--temperature", type=float, default=0.0, metavar="X", help="of the requests (default: 0)")
    group.add_argument(
        "--seed", type=whole_number, default=0, metavar="N", help="for prompts and their times (default: 0)"
    )
    group.add_argument(
        "--num-warmups", type=whole_number, default=0, metavar="N", help="requests before the measurement (default: 0)"
    )


def _add_result(group: _ArgumentGroup) -> None:
    group.add_argument(
        "--percentile-metrics", default="ttft,tpot,itl", help=f"metrics to print, of {','.join(METRICS)}"
    )
    group.add_argument(
        "--metric-percentiles", default="99", help="percentiles to print, with commas between them (default: 99)"
    )
    group.add_argument("--goodput", nargs="*", default=[], metavar="METRIC:MS", help="limits that a good request keeps")
    group.add_argument("--save-result", action="store_true", help="write the result to a JSON file")
    group.add_argument("--save-detailed", action="store_true", help="the same, with the figures of each request")
    group.add_argument("--result-dir", default=".", metavar="DIR", help="where to write it (default: here)")
    group.add_argument("--result-filename", metavar="FILE", help="name of the JSON file")
    group.add_argument("--label", help="label in the JSON file and in its name")
    group.add_argument("--metadata", nargs="*", default=[], metavar="KEY=VALUE", help="more fields for the JSON file")
    group.add_argument("--disable-tqdm", action="store_true", help="show no progress")


def run(args: Namespace) -> int:
    import httpx

    percentiles = _numbers("--metric-percentiles", args.metric_percentiles)
    shown = [name for name in args.percentile_metrics.split(",") if name]
    if wrong := [name for name in shown if name not in METRICS]:
        raise ConfigError(
            f"--percentile-metrics must be of {', '.join(METRICS)}, got {wrong[0]!r}", field="percentile_metrics"
        )
    goals = _goals(args.goodput)
    for name in POSITIVE:
        if not getattr(args, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0, got {getattr(args, name)}", field=name)
    for name in ("shared_prefix_len", "prefix_len", "think_time"):
        if not getattr(args, name) >= 0:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} must be at least 0, got {getattr(args, name)}", field=name)
    if args.max_concurrency is not None and args.max_concurrency < 1:
        raise ConfigError(f"--max-concurrency must be at least 1, got {args.max_concurrency}", field="max_concurrency")
    url = (args.base_url or f"http://{args.host}:{args.port}").rstrip("/")
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    if args.model is None:
        try:
            args.model = httpx.get(f"{url}/v1/models", headers=headers).json()["data"][0]["id"]
        except (httpx.HTTPError, ValueError, KeyError, LookupError) as error:
            raise EngineError(f"no models are listed at {url}: {error}") from None
    args.tokenizer = args.tokenizer or args.model
    prompts = make_prompts(args, _load_tokenizer(args.tokenizer))
    args.num_prompts = sum(1 + len(prompt.later) for prompt in prompts)
    bench = Bench(args, url + (args.endpoint or ENDPOINTS[args.backend]), headers)
    outcomes, duration = asyncio.run(bench.run(prompts))
    result = summarise(outcomes, duration, percentiles, goals)
    _print(result, args, shown, percentiles)
    if args.save_result or args.save_detailed or args.result_filename:
        _save(result, args)
    return 0 if result["completed"] else 1


def _load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    from twofold.config import EngineConfig
    from twofold.models.source import load_tokenizer, resolve

    # With dummy weights the directory may have none: only the tokenizer is read.
    return load_tokenizer(None, resolve(EngineConfig(model=name, load_format="dummy")))


# Load


class Bench:
    """Sends prompts at their times, and times the answers."""

    def __init__(self, args: Namespace, url: str, headers: dict[str, str]) -> None:
        self.args, self.url, self.headers = args, url, headers
        self.max_concurrent = 0
        self._num_running = 0

    async def run(self, prompts: Sequence[Prompt]) -> tuple[list[Outcome], float]:
        """Sends each prompt, and what follows it in its conversation.

        → the outcome of each request, and seconds from the first request to the end of the last.
        """
        import httpx

        args = self.args
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(timeout=None, limits=limits, headers=self.headers) as client:
            for _ in range(1 + args.num_warmups):
                outcome = await self._ask(client, self._warmup(prompts[0]), time.perf_counter())
                if not outcome.success:
                    raise EngineError(f"the first request failed: {outcome.error}")
            gate = asyncio.Semaphore(args.max_concurrency or len(prompts))
            with tqdm(total=args.num_prompts, disable=args.disable_tqdm) as bar:
                begin = time.perf_counter()

                async def talk(prompt: Prompt) -> list[Outcome]:
                    outcomes = []
                    while True:
                        async with gate:
                            outcomes.append(await self._ask(client, prompt, begin))
                        bar.update()
                        if not prompt.later or not outcomes[-1].success:
                            return outcomes
                        prompt = prompt.next(outcomes[-1].text)
                        await asyncio.sleep(args.think_time)

                tasks = [asyncio.create_task(talk(prompt)) async for prompt in self._arrivals(prompts)]
                outcomes = [outcome for talked in await asyncio.gather(*tasks) for outcome in talked]
                return outcomes, time.perf_counter() - begin

    def _warmup(self, prompt: Prompt) -> Prompt:
        """What no conversation begins with: it would be in the cache when they begin."""
        return Prompt("Hello", 0, prompt.max_tokens) if self.args.dataset_name == "conversations" else prompt

    async def _arrivals(self, prompts: Sequence[Prompt]) -> AsyncIterator[Prompt]:
        """Yields each prompt at its time. Gaps have a gamma distribution; with burstiness 1 an exponential one."""
        rate, shape = self.args.request_rate, self.args.burstiness
        rng = np.random.default_rng(self.args.seed + 1)
        due = time.perf_counter()
        for prompt in prompts:
            yield prompt
            if rate < math.inf:
                due += rng.gamma(shape, 1 / (rate * shape))
                await asyncio.sleep(max(due - time.perf_counter(), 0))

    async def _ask(self, client: "httpx.AsyncClient", prompt: Prompt, begin: float) -> Outcome:
        import httpx

        outcome = Outcome(prompt.num_tokens, prompt.turn)
        self._num_running += 1
        self.max_concurrent = max(self.max_concurrent, self._num_running)
        start = last = time.perf_counter()
        outcome.start = start - begin
        try:
            async with client.stream("POST", self.url, json=self._body(prompt)) as response:
                if response.status_code != 200:
                    outcome.error = f"{response.status_code}: {(await response.aread()).decode(errors='replace')[:500]}"
                    return outcome
                async for line in response.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        outcome.error = str(event["error"])
                        return outcome
                    now = time.perf_counter()
                    if usage := event.get("usage"):
                        outcome.num_tokens = usage["completion_tokens"]
                        outcome.prompt_len = usage["prompt_tokens"]
                        outcome.cached_len = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
                    if event["choices"]:
                        if outcome.ttft:
                            outcome.itl.append(now - last)
                        else:
                            outcome.ttft = now - start
                        last = now
                        choice = event["choices"][0]
                        outcome.text += choice.get("text") or choice.get("delta", {}).get("content") or ""
                outcome.latency, outcome.success = last - start, outcome.ttft > 0
        except (httpx.HTTPError, ValueError, KeyError) as error:
            outcome.error = f"{type(error).__name__}: {error}"
        finally:
            self._num_running -= 1
        return outcome

    def _body(self, prompt: Prompt) -> dict[str, Any]:
        args = self.args
        body: dict[str, Any] = {
            "model": args.model,
            "temperature": args.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if args.ignore_eos:
            body["ignore_eos"] = True
        if args.backend == "openai-chat":
            messages = [*prompt.history, {"role": "user", "content": prompt.content}]
            return body | {"messages": messages, "max_completion_tokens": prompt.max_tokens}
        content = prompt.content
        if isinstance(content, str):
            content = "".join(message["content"] for message in prompt.history) + content
        return body | {"prompt": content, "max_tokens": prompt.max_tokens}


# Result


def summarise(
    outcomes: Sequence[Outcome], duration: float, percentiles: Sequence[float], goals: dict[str, float]
) -> dict[str, Any]:
    """The result, with vLLM's fields."""
    good = [outcome for outcome in outcomes if outcome.success]
    num_in, num_out = sum(one.prompt_len for one in good), sum(one.num_tokens for one in good)
    result: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "total_input_tokens": num_in,
        "total_output_tokens": num_out,
        "total_cached_tokens": sum(one.cached_len or 0 for one in good),
        "prefix_cache_hit_rate": _hit_rate(good),
        "turns": _by_turn(good),
        "request_throughput": len(good) / duration,
        "request_goodput": sum(_keeps(one, goals) for one in good) / duration if goals else None,
        "output_throughput": num_out / duration,
        "total_token_throughput": (num_in + num_out) / duration,
        "max_concurrent_requests": _most_at_once(good),
        "input_lens": [one.prompt_len for one in outcomes],
        "output_lens": [one.num_tokens for one in outcomes],
        "ttfts": [one.ttft for one in outcomes],
        "itls": [one.itl for one in outcomes],
        "start_times": [one.start for one in outcomes],
        "generated_texts": [one.text for one in outcomes],
        "errors": [one.error for one in outcomes],
    }
    values = {
        "ttft": [one.ttft for one in good],
        "tpot": [one.tpot for one in good if one.num_tokens > 1],
        "itl": [gap for one in good for gap in one.itl],
        "e2el": [one.latency for one in good],
    }
    for name, seconds in values.items():
        ms = np.array(seconds or [0.0]) * 1000
        result[f"mean_{name}_ms"] = float(ms.mean())
        result[f"median_{name}_ms"] = float(np.median(ms))
        result[f"std_{name}_ms"] = float(ms.std())
        for percentile in percentiles:
            result[f"p{percentile:g}_{name}_ms"] = float(np.percentile(ms, percentile))
    return result


def _hit_rate(outcomes: Sequence[Outcome]) -> float | None:
    """Cached tokens / tokens of the prompts; None if the server does not tell of cached ones."""
    told = [one for one in outcomes if one.cached_len is not None]
    return sum(one.cached_len or 0 for one in told) / sum(one.prompt_len for one in told) if told else None


def _by_turn(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """What each turn of the conversations took."""
    turns = []
    for turn in sorted({one.turn for one in outcomes}):
        of_turn = [one for one in outcomes if one.turn == turn]
        ttfts = np.array([one.ttft for one in of_turn]) * 1000
        turns.append(
            {
                "turn": turn,
                "completed": len(of_turn),
                "mean_input_tokens": sum(one.prompt_len for one in of_turn) / len(of_turn),
                "prefix_cache_hit_rate": _hit_rate(of_turn),
                "mean_ttft_ms": float(ttfts.mean()),
                "median_ttft_ms": float(np.median(ttfts)),
                "max_ttft_ms": float(ttfts.max()),
            }
        )
    return turns


def _most_at_once(outcomes: Sequence[Outcome]) -> int:
    changes = sorted([(one.start, 1) for one in outcomes] + [(one.start + one.latency, -1) for one in outcomes])
    return int(np.cumsum([change for _, change in changes] or [0]).max())


def _keeps(outcome: Outcome, goals: dict[str, float]) -> bool:
    measured = {"ttft": outcome.ttft, "tpot": outcome.tpot, "e2el": outcome.latency}
    return all(measured[name] * 1000 <= limit for name, limit in goals.items())


def _goals(given: Sequence[str]) -> dict[str, float]:
    goals = {}
    for one in given:
        name, _, limit = one.partition(":")
        if name not in ("ttft", "tpot", "e2el"):
            raise ConfigError(f"--goodput must be like ttft:200, of ttft, tpot and e2el, got {one!r}", field="goodput")
        goals[name] = _numbers("--goodput", limit)[0]
    return goals


def _numbers(flag: str, text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        field = flag.strip("-").replace("-", "_")
        raise ConfigError(f"{flag} must be numbers with commas between them, got {text!r}", field=field) from None


def _print(result: dict[str, Any], args: Namespace, shown: Sequence[str], percentiles: Sequence[float]) -> None:
    def line(name: str, value: Any) -> None:
        print(f"{name + ':':<40} {value:<10.2f}" if isinstance(value, float) else f"{name + ':':<40} {value:<10}")

    print(f"{' Serving Benchmark Result ':=^50}")
    line("Successful requests", result["completed"])
    line("Failed requests", result["failed"])
    if args.max_concurrency is not None:
        line("Maximum request concurrency", args.max_concurrency)
    if args.request_rate < math.inf:
        line("Request rate configured (RPS)", args.request_rate)
    line("Benchmark duration (s)", result["duration"])
    line("Total input tokens", result["total_input_tokens"])
    line("Total generated tokens", result["total_output_tokens"])
    if (hit_rate := result["prefix_cache_hit_rate"]) is not None:
        line("Cached input tokens", result["total_cached_tokens"])
        line("Prefix cache hit rate (%)", 100 * hit_rate)
    line("Request throughput (req/s)", result["request_throughput"])
    if result["request_goodput"] is not None:
        line("Request goodput (req/s)", result["request_goodput"])
    line("Output token throughput (tok/s)", result["output_throughput"])
    line("Peak concurrent requests", result["max_concurrent_requests"])
    line("Total token throughput (tok/s)", result["total_token_throughput"])
    for name in shown:
        print(f"{METRICS[name]:-^50}")
        for how in ("mean", "median", *(f"p{percentile:g}" for percentile in percentiles)):
            line(f"{how.capitalize()} {name.upper()} (ms)", result[f"{how}_{name}_ms"])
    if len(result["turns"]) > 1:
        print(f"{'Time to First Token by Turn':-^50}")
        print_table(
            ("turn", "requests", "input tokens", "hit rate %", "median ms", "max ms"), _turn_cells(result["turns"])
        )
    print("=" * 50)
    for error in sorted({error for error in result["errors"] if error})[:3]:
        print(f"failed: {error}", file=sys.stderr)


def _turn_cells(turns: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            *(str(turn["turn"]), str(turn["completed"]), f"{turn['mean_input_tokens']:.0f}"),
            "" if turn["prefix_cache_hit_rate"] is None else f"{100 * turn['prefix_cache_hit_rate']:.1f}",
            *(f"{turn['median_ttft_ms']:.1f}", f"{turn['max_ttft_ms']:.1f}"),
        ]
        for turn in turns
    ]


def _save(result: dict[str, Any], args: Namespace) -> None:
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    rate = args.request_rate if args.request_rate < math.inf else "inf"
    whole: dict[str, Any] = {
        "date": now,
        "endpoint_type": args.backend,
        "backend": args.backend,
        "label": args.label,
        "model_id": args.model,
        "tokenizer_id": args.tokenizer,
        "num_prompts": args.num_prompts,
        **dict(pair.partition("=")[::2] for pair in args.metadata),
        "request_rate": rate,
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
        **result,
    }
    if not args.save_detailed:
        for name in ("input_lens", "output_lens", "ttfts", "itls", "start_times", "generated_texts", "errors"):
            del whole[name]
    at_once = f"-concurrency{args.max_concurrency}" if args.max_concurrency is not None else ""
    name = f"{args.label or args.backend}-{rate}qps{at_once}-{Path(args.model).name}-{now}.json"
    path = Path(args.result_dir) / (args.result_filename or name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole))
    print(f"written to {path}", file=sys.stderr)
