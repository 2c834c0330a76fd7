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
from argparse import ArgumentParser, Namespace, _ArgumentGroup
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twofold.bench.load import Bench
from twofold.bench.prompts import make_prompts
from twofold.bench.result import METRICS, print_result, summarise
from twofold.errors import ConfigError, EngineError
from twofold.flags import whole_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENDPOINTS = {"openai": "/v1/completions", "vllm": "/v1/completions", "openai-chat": "/v1/chat/completions"}
DATASETS = ("random", "conversations", "custom", "sharegpt")
POSITIVE = (
    *("num_prompts", "num_conversations", "num_turns", "num_shared_prefixes", "turn_len", "output_len"),
    *("request_rate", "burstiness"),
)


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
    print_result(result, args, shown, percentiles)
    if args.save_result or args.save_detailed or args.result_filename:
        _save(result, args)
    return 0 if result["completed"] else 1


def _load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    from twofold.config import EngineConfig
    from twofold.models.source import load_tokenizer, resolve

    # With dummy weights the directory may have none: only the tokenizer is read.
    return load_tokenizer(None, resolve(EngineConfig(model=name, load_format="dummy")))


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
