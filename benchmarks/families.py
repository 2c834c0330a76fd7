"""Compare every served family with Transformers, on one to four ranks, with each holding, in each layout of steps.

    python benchmarks/families.py --output-json benchmarks/results/cpu-families.json [TYPE ...]
    python benchmarks/families.py --kv-cache sharded --output-json benchmarks/results/cpu-families-sharded.json
    python benchmarks/families.py --holdings --output-json benchmarks/results/cpu-families-holdings.json
    python benchmarks/families.py --combinations --output-json benchmarks/results/cpu-combinations.json [SHAPE ...]

Tiny random models in float32, ranks as threads. Prompts come in chunks, a second pass finds their prefixes in the
cache, and in a third one requests are preempted and all ranks are lost and come back. What is asked of each run,
besides Transformers' greedy tokens: at the end every block is free; hidden states by heads are the same bits on all
ranks; so is a replicated cache. `--holdings` runs every type on two ranks with sharded weights;
`--combinations` a few shapes with all weights × kv_cache × ranks × layouts. Runs in the JSON of other types stay there.
"""

import argparse
import copy
import itertools
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from harness import ThreadExecutor, generate, make_engine, prompt_logprobs, reference_continuation, reference_logprobs
from tiny_models import VOCAB_SIZE, tiny_config, tiny_model

from twofold.bench.report import environment
from twofold.engine.engine import LLMEngine
from twofold.errors import ModelError
from twofold.models.decoder import DecoderModel
from twofold.models.support import ONLY_BY_TOKENS, causal_model_types, refusal
from twofold.outputs import RequestOutput
from twofold.sampling_params import SamplingParams

PROMPT_LENS = (1, 3, 37, 70)
NUM_TOKENS = 8
GROWING_LENS, NUM_GROWING_TOKENS = (29, 30, 31), 16  # start together, and do not all have room to the end
LOST_AFTER = 5  # steps of the last pass


def shape(num_heads: int, num_kv_heads: int, **changes: Any) -> dict[str, Any]:
    """Widths that 2, 3 and 4 divide."""
    return {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads, "hidden_size": 96,
            "intermediate_size": 96, "head_dim": 16} | changes  # fmt: skip


EXPERTS = {"moe_intermediate_size": 48}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, 1 KV head": ("llama", shape(12, 1, tie_word_embeddings=True)),
    "llama, 2 KV heads": ("llama", shape(12, 2, attention_bias=True, mlp_bias=True)),
    "llama, 3 KV heads": ("llama", shape(12, 3)),
    "llama, 8 KV heads": ("llama", shape(24, 8)),
    "phi3, packed": ("phi3", shape(12, 3)),
    "deepseek_v3, latents": ("deepseek_v3", {"num_attention_heads": 12, "num_key_value_heads": 12, "hidden_size": 96,
                                             "intermediate_size": 96, **EXPERTS}),
    "mixtral, experts": ("mixtral", shape(12, 2)),
    "qwen3_moe, experts": ("qwen3_moe", shape(12, 3, decoder_sparse_step=1, mlp_only_layers=[], **EXPERTS)),
    "gemma3_text, windows": ("gemma3_text", shape(12, 2)),
    "gpt_oss, windows and sinks": ("gpt_oss", shape(24, 8)),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Way:
    num_ranks: int
    layout: str
    weights: str = "replicated"
    kv_cache: str = "replicated"


class Case:
    """A model, and what Transformers says of each prompt."""

    def __init__(self, name: str, model: PreTrainedModel) -> None:
        self.name, self.model = name, model
        self.prompts, self.growing = prompts_of(PROMPT_LENS), prompts_of(GROWING_LENS)
        self.logprobs = [reference_logprobs(model, prompt) for prompt in self.prompts]
        self.answers = [reference_continuation(model, prompt, NUM_TOKENS) for prompt in self.prompts]
        self.growing_answers = [reference_continuation(model, prompt, NUM_GROWING_TOKENS) for prompt in self.growing]

    def run(self, way: Way) -> dict[str, Any]:
        """
        Raises:
            ModelError: the model is not served in this way.
        """
        start, num_blocks = time.perf_counter(), 13
        if way.kv_cache == "sharded":
            num_blocks = -(-num_blocks // way.num_ranks)
        engine = make_engine(
            self.model, way.num_ranks, step_layout=way.layout, weights=way.weights, kv_cache=way.kv_cache,
            max_num_batched_tokens=40, max_model_len=96, num_blocks=num_blocks, block_size=8,
        )  # fmt: skip
        hidden = watch_hidden_states(engine)
        only_by_tokens = engine.reports[0].only_by_tokens
        found = prompt_logprobs(engine, self.prompts)
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
        same_tokens = are_right(generate(engine, self.prompts, params), self.answers)
        same_bits = are_the_same(hidden) and are_the_same(caches(engine))
        num_hits = engine.scheduler.num_prefix_hits

        def lose_ranks(num_steps: int) -> None:
            nonlocal hidden
            if num_steps == LOST_AFTER:
                engine.recover()
                hidden = watch_hidden_states(engine)

        params = SamplingParams(temperature=0, max_tokens=NUM_GROWING_TOKENS)
        outputs = generate(engine, self.growing, params, after_step=lose_ranks)
        same_tokens &= are_right(outputs, self.growing_answers)
        same_bits &= are_the_same(hidden) and are_the_same(caches(engine))
        engine.shutdown()
        errors = [np.abs(mine - theirs).max(initial=0) for mine, theirs in zip(found, self.logprobs, strict=True)]
        row = {"type": self.name, **asdict(way)}
        if only_by_tokens is not None and way.num_ranks > 1:
            row["layout"] = "tokens"
        return row | {
            "max_error": float(max(errors)), "same_tokens": same_tokens, "same_bits": same_bits,
            "blocks_free": engine.block_pool.is_idle(), "prefix_hits": num_hits,
            "preemptions": engine.scheduler.num_preemptions, "seconds": round(time.perf_counter() - start, 1),
        }  # fmt: skip


def prompts_of(lens: Iterable[int]) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, VOCAB_SIZE, length).tolist() for length in lens]


def are_right(outputs: list[RequestOutput], answers: list[list[int]]) -> bool:
    """Whether each output begins with the clear tokens of Transformers' answer."""
    pairs = zip(outputs, answers, strict=True)
    return all(output.outputs[0].token_ids[: len(tokens)] == tokens for output, tokens in pairs)


def watch_hidden_states(engine: LLMEngine) -> list[list[torch.Tensor]]:
    """→ of each rank, its hidden states of all steps by heads from now on."""
    assert isinstance(engine.executor, ThreadExecutor)
    everyones: list[list[torch.Tensor]] = []
    for runner in engine.executor.runners:
        everyones.append([])

        def forward(way: Any, *args: Any, run: Any = runner._forward_eager, mine: Any = everyones[-1]) -> torch.Tensor:
            hidden: torch.Tensor = run(way, *args)
            if way.layout.by_heads:
                mine.append(hidden.clone())
            return hidden

        runner._forward_eager = forward  # type: ignore[method-assign]
    return everyones


def caches(engine: LLMEngine) -> list[list[torch.Tensor]]:
    """Of each rank its cache without null blocks, if all should have the same."""
    assert isinstance(engine.executor, ThreadExecutor)
    if engine.is_sharded:
        return []
    return [[blocks[1:] for blocks in runner.cache.blocks] for runner in engine.executor.runners]


def are_the_same(everyones: list[list[torch.Tensor]]) -> bool:
    """Whether all ranks have the same bits."""
    first = everyones[0] if everyones else []
    return all(
        len(mine) == len(first) and all(torch.equal(a, b) for a, b in zip(mine, first, strict=True))
        for mine in everyones
    )


def families(kv_cache: str, types: list[str]) -> Iterator[tuple[str, Any, list[Way]]]:
    """Every type on one to four ranks."""
    places = [(1, "tokens"), (2, "heads"), (2, "mixed"), (3, "mixed"), (4, "heads"), (4, "mixed")]
    for model_type in types or causal_model_types():
        ways = [Way(*place, kv_cache=kv_cache) for place in places]
        yield (
            model_type,
            (model_type, {}),
            [way for way in ways if way.layout != "heads" or model_type not in ONLY_BY_TOKENS],
        )


def holdings(types: list[str]) -> Iterator[tuple[str, Any, list[Way]]]:
    """Every type that divides, on two ranks with sharded weights."""
    for model_type in types or causal_model_types():
        if model_type not in ONLY_BY_TOKENS:
            ways = [Way(2, "mixed", "sharded", kv_cache) for kv_cache in ("replicated", "sharded")]
            yield model_type, (model_type, {}), ways


def combinations(shapes: list[str]) -> Iterator[tuple[str, Any, list[Way]]]:
    """A few shapes in every way."""
    kinds = ("replicated", "sharded")
    ways = [Way(*way) for way in itertools.product((2, 3, 4), ("tokens", "heads", "mixed"), kinds, kinds)]
    for name in shapes or SHAPES:
        yield name, SHAPES[name], [Way(1, "tokens"), *ways]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="TYPE")
    parser.add_argument("--kv-cache", choices=("replicated", "sharded"), default="replicated")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--holdings", action="store_true", help="every type on two ranks with sharded weights")
    which.add_argument("--combinations", action="store_true", help="a few shapes, all combinations")
    parser.add_argument("--output-json", type=Path)
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    if args.combinations:
        cases = combinations(args.names)
    else:
        cases = holdings(args.names) if args.holdings else families(args.kv_cache, args.names)
    rows, refused = [], []
    for name, (model_type, changes), ways in cases:
        try:
            model = tiny_model(tiny_config(model_type, **changes))
            if refusal(model.config) is not None:
                continue
            DecoderModel(copy.deepcopy(model))  # fails where a type is not served
            case = Case(name, model)
        except Exception as error:
            if args.names:
                raise
            print(name, "cannot be made:", str(error)[:100], file=sys.stderr)
            continue
        for way in ways:
            try:
                rows.append(case.run(way))
            except ModelError as error:
                refused.append({"type": name, **asdict(way), "reason": str(error)})
                print(json.dumps(refused[-1]), flush=True)
                continue
            print(json.dumps(rows[-1]), flush=True)
    if args.output_json:
        rows, refused = write(args.output_json, rows, refused)
    print(summary(rows, refused))


def write(
    path: Path, rows: list[dict[str, Any]], refused: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Writes the result → all rows in it."""
    before = json.loads(path.read_text()) if path.exists() else {"runs": [], "refused": []}
    again = {row["type"] for row in rows + refused}
    rows = [row for row in before["runs"] if row["type"] not in again] + rows
    refused = [row for row in before.get("refused", []) if row["type"] not in again] + refused
    result = {"environment": environment(), "summary": summary(rows, refused), "runs": rows, "refused": refused}
    head, body = json.dumps({key: result[key] for key in ("environment", "summary")}, indent=1), []
    for key in ("runs", "refused"):
        lines = ",\n  ".join(json.dumps(row) for row in result[key])
        body.append(f' "{key}": [\n  {lines}\n ]')
    path.write_text(head.removesuffix("\n}") + ",\n" + ",\n".join(body) + "\n}\n")
    return rows, refused


def summary(rows: list[dict[str, Any]], refused: list[dict[str, Any]]) -> str:
    if not rows:
        return f"no runs, {len(refused)} refused"
    keys = ("same_tokens", "same_bits", "blocks_free", "preemptions", "prefix_hits")
    counts = {key: sum(bool(row[key]) for row in rows) for key in keys}
    return (
        f"{len(rows)} runs of {len({row['type'] for row in rows})} types, all ranks lost once in each: largest error "
        f"{max(row['max_error'] for row in rows):.1e}, same tokens in {counts['same_tokens']}, same bits on all ranks "
        f"in {counts['same_bits']}, all blocks free in {counts['blocks_free']}, preempted in {counts['preemptions']}, "
        f"prefixes found in {counts['prefix_hits']}; {len(refused)} refused"
    )


if __name__ == "__main__":
    main()
