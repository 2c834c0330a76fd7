"""Answer random JSON schemas, and check every whole answer with jsonschema.

    python benchmarks/json_schemas.py --model demo -pcp 2 --part alone --output-json F     one request at a time
    python benchmarks/json_schemas.py --model demo -pcp 2 --part together --output-json F  32 at once

Parts of one file are kept beside each other, so each can be run by itself (`--first`, `--count`: some of the schemas).
The temperature is 1. A rank is killed every --kill-every steps. Every string, array, object and number that a schema
allows has an end, since a model may write digits or members for ever where it may. An answer that --max-tokens cuts is
no valid one, and is counted apart.
"""

import argparse
import ipaddress
import json
import os
import random
import re
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import jsonschema

from twofold import LLM
from twofold.bench.report import describe, environment
from twofold.config import EngineConfig
from twofold.engine.drive import Drive
from twofold.flags import add_engine_arguments, chosen
from twofold.outputs import RequestOutput
from twofold.sampling_params import SamplingParams, StructuredOutputsParams

CLOCK = r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"  # of RFC 3339
CHECKER = jsonschema.FormatChecker(formats=())
AT_ONCE = 32
KILL_EVERY = {"alone": 2000, "together": 200}  # steps
NAMES = ("name", "id", "title", "price", "tags", "Straße", "is_open", "address", "a b", "x")
PATTERNS = ("^[a-z]{2,6}$", "^[A-Z][a-z]+(-[0-9]{1,3})?$", "^(red|green|blue)$", "^\\d{4}-\\d{2}$")
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser)
    parser.add_argument("--part", choices=("alone", "together"), required=True)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--kill-every", type=int, help=f"steps; 0 kills none (default: {KILL_EVERY})")
    parser.add_argument("--max-tokens", type=int, default=2000, help="of an answer")
    parser.add_argument("--output-json", type=Path)
    args = parser.parse_args()
    arguments = chosen(args, EngineConfig)
    arguments.setdefault("max_model_len", args.max_tokens + 128)
    arguments.setdefault("max_num_seqs", AT_ONCE)
    with LLM(**arguments) as llm:
        schemas = [make_schema(random.Random(seed)) for seed in range(args.first, args.first + args.count)]
        every = KILL_EVERY[args.part] if args.kill_every is None else args.kill_every
        result = check_answers(llm, schemas, AT_ONCE if args.part == "together" else 1, args.max_tokens, every)
        name = f"{args.part} {args.first}-{args.first + args.count - 1}"
        result |= {"settings": describe(llm.engine), "environment": environment()}
    print(json.dumps({name: result}, indent=1))
    if args.output_json:
        before = json.loads(args.output_json.read_text()) if args.output_json.exists() else {}
        args.output_json.write_text(json.dumps(before | {name: result}, indent=1) + "\n")


def make_schema(rng: random.Random) -> dict[str, Any]:
    """An object whose properties are of all kinds, some of them by reference. No answer can go on for ever."""
    schema = _object(rng, depth=0)
    if rng.random() < 0.3:
        schema["properties"]["next"] = {"$ref": "#/$defs/node"}
        node = {"type": "object", "properties": {"value": _any(rng, 2), "last": {"$ref": "#/$defs/leaf"}}}
        schema["$defs"] = {"node": node | {"required": ["value"], "additionalProperties": False}, "leaf": _any(rng, 3)}
    return schema


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds: list[Callable[[random.Random, int], dict[str, Any]]] = [_string, _string, _number, _choice]
    if depth < 3:
        kinds += [_object, _array, _union]
    return rng.choice(kinds)(rng, depth)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(1, 4))
    schema: dict[str, Any] = {"type": "object", "properties": {name: _any(rng, depth + 1) for name in names}}
    schema["required"] = [name for name in names if rng.random() < 0.7]
    schema["additionalProperties"] = False
    if depth and rng.random() < 0.3:
        # A model may write a name twice, so they are counted. For that, llguidance wants all others required.
        counted = {"required": names, "maxProperties": len(names) + 2}
        schema |= {"patternProperties": {"^k[0-9]$": _string(rng, 3)}} | counted
    return schema


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 2)
    return {"type": "array", "items": _any(rng, depth + 1), "minItems": least, "maxItems": least + rng.randint(0, 3)}


def _union(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_any(rng, depth + 1) for _ in range(rng.randint(2, 3))]}


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    limits: list[dict[str, Any]] = [
        {"maxLength": rng.randint(4, 30)},
        {"minLength": 3, "maxLength": 12},
        {"pattern": rng.choice(PATTERNS), "maxLength": 20},
        {"format": rng.choice(FORMATS), "maxLength": 40},
    ]
    return {"type": "string"} | rng.choice(limits)


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(-1000, 1000)
    limits: list[dict[str, Any]] = [
        {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)},
        {"type": "integer", "exclusiveMinimum": low, "maximum": low + 1 + rng.randint(0, 9)},
        {"type": "integer", "minimum": 0, "maximum": 1000, "multipleOf": rng.choice([5, 7])},
        {"type": "number", "minimum": 0, "maximum": 1000, "multipleOf": rng.choice([0.5, 0.25])},
    ]
    return rng.choice(limits)


def _choice(rng: random.Random, depth: int) -> dict[str, Any]:
    values = [None, True, 7, -1.5, "yes", 'no "quotes"', "é", [1, "a"], {"k": 1}]
    choices: list[dict[str, Any]] = [
        {"enum": rng.sample(values, 3)},
        {"const": rng.choice(values)},
        {"type": "boolean"},
        {"type": ["boolean", "null"]},
    ]
    return rng.choice(choices)


def check_answers(
    llm: LLM, schemas: list[dict[str, Any]], at_once: int, max_tokens: int, kill_every: int
) -> dict[str, Any]:
    """Answers to every schema, so many at once. A rank is killed every `kill_every` steps, if that is not 0."""
    seen: Counter[str] = Counter()
    wrong: list[dict[str, Any]] = []
    lengths, start = [], time.perf_counter()
    numbered = list(enumerate(schemas))
    batches = [numbered] if at_once > 1 else [[one] for one in numbered]
    kill = killer(llm, kill_every)
    for number, output in (pair for batch in batches for pair in answers(llm, batch, max_tokens, kill)):
        [completion] = output.outputs
        lengths.append(len(completion.token_ids))
        reason = str(completion.finish_reason)
        if reason == "stop" and (fault := fault_of(completion.text, schemas[number])) is not None:
            reason = "invalid"
            wrong.append({"schema": schemas[number], "text": completion.text, "fault": fault})
        seen[reason] += 1
        if len(lengths) % 20 == 0:
            print(f"{len(lengths)} of {len(schemas)}: {dict(seen)}", flush=True)
    return {
        "num_schemas": len(schemas),
        "at_once": at_once,
        "valid": seen["stop"],
        "invalid": seen["invalid"],
        "cut_by_max_tokens": seen["length"],
        "failed": seen["error"] + seen["abort"],
        "wrong": wrong,
        "max_tokens": max_tokens,
        "num_tokens": sum(lengths),
        "longest": max(lengths),
        "num_restarts": llm.engine.stats.num_restarts,
        "seconds": round(time.perf_counter() - start, 1),
    }


def is_date(text: str) -> bool:
    """RFC 3339 has a year 0, which is a leap year; Python's dates begin with year 1."""
    return re.fullmatch(r"\d{4}-\d\d-\d\d", text) is not None and bool(
        date.fromisoformat(re.sub("^0000", "2000", text))
    )


def is_time(text: str) -> bool:
    return re.fullmatch(CLOCK, text, re.IGNORECASE) is not None


for name, is_valid in {
    "date": is_date,
    "time": is_time,
    "date-time": lambda text: is_date(text[:10]) and text[10:11].lower() == "t" and is_time(text[11:]),
    "uuid": lambda text: bool(uuid.UUID(text)),
    "ipv4": lambda text: bool(ipaddress.IPv4Address(text)),
    "email": lambda text: re.fullmatch(r"[^@]+@[^@]+", text) is not None,
}.items():
    CHECKER.checks(name, raises=ValueError)(
        lambda value, is_valid=is_valid: not isinstance(value, str) or is_valid(value)
    )


def answers(
    llm: LLM, numbered: list[tuple[int, dict[str, Any]]], max_tokens: int, kill: Callable[[], None]
) -> Iterator[tuple[int, RequestOutput]]:
    """Each schema's number and its answer, as they end. The engine runs `max_num_seqs` of them at once."""
    with Drive(llm.engine) as drive:
        for number, schema in numbered:
            params = SamplingParams(
                max_tokens=max_tokens, seed=number, structured_outputs=StructuredOutputsParams(json=schema)
            )
            drive.add(f"{number}", f"Here is an example of JSON, number {number}:\n", params)
        for outputs in drive:
            yield from ((int(output.request_id), output) for output in outputs if output.finished)
            kill()


def killer(llm: LLM, every: int) -> Callable[[], None]:
    """Kills a rank after 15 steps of the engine, and then every so many."""
    due = 15

    def kill() -> None:
        nonlocal due
        if every and llm.engine.stats.num_steps >= due:
            due += every
            os.kill(llm.engine.executor.pids[-1], signal.SIGKILL)  # type: ignore[attr-defined]

    return kill


def fault_of(text: str, schema: dict[str, Any]) -> str | None:
    """What is wrong with an answer; None if it is as its schema says."""
    try:
        jsonschema.Draft202012Validator(schema, format_checker=CHECKER).validate(json.loads(text))
    except (jsonschema.ValidationError, json.JSONDecodeError) as error:
        return str(error).splitlines()[0]
    return None


if __name__ == "__main__":
    main()
