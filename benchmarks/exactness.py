"""Compare greedy answers on any number of ranks with Transformers' `generate`, in float32, on real processes.

    python benchmarks/exactness.py [--ranks 1,2,3,4] [--lens 1,2,3,7,31,500,4000] [--chunks 64,1000,whole]
                                   [--new-tokens 64] [--output-json FILE]

For each number of ranks and each chunk size (max_num_batched_tokens) it runs
    without prefix caching   all prompts in one batch, with the log-probabilities of all their tokens
    with prefix caching      each prompt alone (only those that are longer than a chunk); then all prompts in one batch,
                             where those that ran before are read from the cache
For each number of ranks it also runs with a KV cache so small that requests are preempted. Prompts are English prose.
The exit code is 1 if any token differs, if any log-probability differs by more than 1e-4, or if nothing was cached or
preempted where it should have been.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from twofold import LLM, RequestOutput, SamplingParams
from twofold.bench.report import environment, print_table
from twofold.machine import usable_cores
from twofold.models.source import demo_directory

TEXT = Path(__file__).parents[1] / "examples" / "alice.txt"
BLOCK_SIZE = 16
WHOLE = 8192  # tokens per step: more than all prompts have together
TOLERANCE = 1e-4  # of log-probabilities


@dataclass(eq=False)
class Case:
    """A prompt, with Transformers' answer to it."""

    prompt: list[int]
    tokens: list[int]
    logprobs: np.ndarray


@dataclass
class Row:
    ranks: int
    chunk: str
    caching: bool
    prompts: str
    equal: int = 0
    total: int = 0
    logprob_error: float | None = None
    cached_tokens: int = 0
    preemptions: int = 0
    seconds: float = 0.0
    problem: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2,3,4")
    parser.add_argument("--lens", default="1,2,3,7,31,500,4000")
    parser.add_argument("--chunks", default="64,1000,whole")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--output-json")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    start = time.monotonic()
    cases = reference([int(part) for part in args.lens.split(",")], args.new_tokens)
    print(f"Transformers' answers to {len(cases)} prompts took {time.monotonic() - start:.0f} s", flush=True)
    matrix = Matrix(cases, args.new_tokens)
    for num_ranks in (int(part) for part in args.ranks.split(",")):
        for chunk in args.chunks.split(","):
            matrix.without_cache(num_ranks, chunk)
            matrix.with_cache(num_ranks, chunk)
        matrix.with_a_small_pool(num_ranks)
    rows = matrix.rows
    header = ["ranks", "chunk", "caching", "prompts", "equal", "logprobs off by", "cached", "preempted", "seconds", ""]
    print()
    print_table(header, [[str(cell) for cell in cells(row)] for row in rows])
    problems = [row for row in rows if row.problem]
    equal, total = sum(row.equal for row in rows), sum(row.total for row in rows)
    seconds = round(time.monotonic() - start)
    print(f"\n{equal} of {total} answers are those of Transformers; {len(problems)} problems; {seconds} s")
    if args.output_json:
        record = environment() | {
            "lens": args.lens, "new_tokens": args.new_tokens, "equal": equal, "total": total, "seconds": seconds,
            "rows": [asdict(row) for row in rows],
        }  # fmt: skip
        Path(args.output_json).write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(1 if problems or equal != total else 0)


def cells(row: Row) -> list[Any]:
    error = "" if row.logprob_error is None else f"{row.logprob_error:.1e}"
    return [
        row.ranks, row.chunk, "on" if row.caching else "off", row.prompts, f"{row.equal}/{row.total}", error,
        row.cached_tokens or "", row.preemptions or "", f"{row.seconds:.1f}", row.problem,
    ]  # fmt: skip


@torch.inference_mode()
def reference(lens: list[int], num_new_tokens: int) -> list[Case]:
    """Transformers' answers, one prompt at a time. No prompt is a prefix of another."""
    torch.set_num_threads(usable_cores())
    directory = demo_directory()
    text = AutoTokenizer.from_pretrained(directory).encode(TEXT.read_text())
    text *= 1 + (max(lens) + 100 * len(lens)) // len(text)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    cases = []
    for number, length in enumerate(lens):
        prompt = text[100 * number : 100 * number + length]
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_new_tokens)
        cases.append(Case(prompt, out[0, length:].tolist(), prompt_logprobs(model, ids)))
    return cases


def prompt_logprobs(model: PreTrainedModel, ids: torch.Tensor) -> np.ndarray:
    """Log-probabilities of the prompt's tokens from the second on; logits are computed for 500 positions at a time."""
    hidden = model.base_model(ids, use_cache=False)[0][0]
    pieces = []
    for first in range(0, ids.shape[1] - 1, 500):
        targets = ids[0, first + 1 : first + 501]
        logits = model.get_output_embeddings()(hidden[first : first + len(targets)])
        pieces.append(logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0].numpy())
    return np.concatenate([np.empty(0, np.float32), *pieces])


class Matrix:
    """Runs the cases, and keeps one row of the table for each pass."""

    def __init__(self, cases: list[Case], num_new_tokens: int) -> None:
        self.cases = cases
        self.greedy = SamplingParams(temperature=0, max_tokens=num_new_tokens)
        self.max_model_len = max(len(case.prompt) for case in cases) + num_new_tokens + 1
        self.rows: list[Row] = []

    def without_cache(self, num_ranks: int, chunk: str) -> None:
        with self.engine(num_ranks, chunk, enable_prefix_caching=False) as llm:
            self.note(llm, Row(num_ranks, chunk, False, "in one batch"), [self.cases], with_logprobs=True)

    def with_cache(self, num_ranks: int, chunk: str) -> None:
        with self.engine(num_ranks, chunk) as llm:
            some = [case for case in self.cases if chunk == "whole" or len(case.prompt) > tokens_of(chunk)]
            self.note(llm, Row(num_ranks, chunk, True, "each alone"), [[case] for case in some])
            self.note(llm, Row(num_ranks, chunk, True, "in one batch"), [self.cases], cached=some)

    def with_a_small_pool(self, num_ranks: int) -> None:
        """Runs all prompts with a cache that can just hold the longest request."""
        num_blocks = -(-self.max_model_len // BLOCK_SIZE) + 1
        with self.engine(num_ranks, "1000", enable_prefix_caching=False, num_blocks=num_blocks) as llm:
            row = Row(num_ranks, "1000", False, "in a small pool")
            # The longest prompt is first: when it grows, the others must be preempted.
            longest, *others = sorted(self.cases, key=lambda case: len(case.prompt), reverse=True)
            self.note(llm, row, [[longest, *reversed(others)]])
            row.preemptions = llm.engine.snapshot().num_preemptions
            if not row.preemptions:
                row.problem += " nothing was preempted;"

    def engine(self, num_ranks: int, chunk: str, num_blocks: int | None = None, **arguments: Any) -> LLM:
        if num_blocks is not None:
            config = transformers.AutoConfig.from_pretrained(demo_directory())
            width = 2 * config.num_key_value_heads * config.head_dim
            arguments["kv_cache_memory_bytes"] = num_blocks * BLOCK_SIZE * config.num_hidden_layers * width * 4
        return LLM(
            "demo",
            prefill_context_parallel_size=num_ranks,
            dtype="float32",
            max_model_len=self.max_model_len,
            max_num_batched_tokens=tokens_of(chunk),
            block_size=BLOCK_SIZE,
            **arguments,
        )

    def note(
        self, llm: LLM, row: Row, batches: list[list[Case]], cached: Sequence[Case] = (), with_logprobs: bool = False
    ) -> None:
        """Runs batches one after the other. The prompts of `cached` ran before on the same engine."""
        params = self.greedy
        if with_logprobs:
            params = replace(params, prompt_logprobs=0)
            row.logprob_error = 0.0
        start = time.monotonic()
        for batch in batches:
            for case, output in zip(batch, self.run(llm, batch, params), strict=True):
                tokens = output.outputs[0].token_ids
                row.total += 1
                row.equal += tokens == case.tokens
                row.cached_tokens += output.num_cached_tokens
                if tokens != case.tokens:
                    same = [one == other for one, other in zip(tokens, case.tokens, strict=False)]
                    first = [*same, False].index(False)
                    row.problem += f" {len(case.prompt)} tokens: the answer differs from token {first} on;"
                due = (len(case.prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE if case in cached else 0
                if output.num_cached_tokens != due:
                    row.problem += f" {len(case.prompt)} tokens: {output.num_cached_tokens} were cached, not {due};"
                if row.logprob_error is not None:
                    entries = zip(output.prompt_logprobs or [], case.prompt, strict=True)
                    found = [entry[token].logprob for entry, token in entries if entry]
                    error = np.abs(np.array(found) - case.logprobs).max(initial=0)
                    row.logprob_error = max(row.logprob_error, float(error))
        row.seconds = round(time.monotonic() - start, 1)
        if row.logprob_error is not None and not row.logprob_error <= TOLERANCE:
            row.problem += f" log-probabilities differ by {row.logprob_error:.1e};"
        if not llm.engine.is_idle:
            row.problem += " the engine is not idle afterwards;"
        self.rows.append(row)
        print("  ".join(str(cell) for cell in cells(row)), flush=True)

    def run(self, llm: LLM, batch: list[Case], params: SamplingParams) -> list[RequestOutput]:
        return llm.generate([{"prompt_token_ids": case.prompt} for case in batch], params, use_tqdm=False)


def tokens_of(chunk: str) -> int:
    return WHOLE if chunk == "whole" else int(chunk)


if __name__ == "__main__":
    main()
