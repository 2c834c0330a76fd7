"""Ask a model about a long text, with the prefill split over ranks, and show what each rank computed.

`scripts/demo` runs this. By default: SmolLM2-135M-Instruct, two ranks, the opening of Alice in Wonderland.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from twofold import LLM, SamplingParams
from twofold.contract import ScheduledBatch
from twofold.parallel.plan import TokenLayout, plan_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", type=Path, default=Path(__file__).with_name("alice.txt"))
    parser.add_argument("--question", default="What did Alice find in the little glass box?")
    parser.add_argument("-pcp", "--prefill-context-parallel-size", type=int, default=2)
    args = parser.parse_args()
    num_ranks = args.prefill_context_parallel_size

    paragraphs = args.text.read_text(encoding="utf-8").strip().split("\n\n")
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    message = f"Read the text and answer the question.\n\n{text}\n\nQuestion: {args.question}"
    start = time.perf_counter()
    with LLM(args.model, prefill_context_parallel_size=num_ranks) as llm:
        seconds = time.perf_counter() - start
        params = SamplingParams(temperature=0, max_tokens=64, stop="\n\n")
        [output] = llm.chat([{"role": "user", "content": message}], params)
        max_num_batched_tokens = llm.engine.runtime.max_num_batched_tokens
    assert output.metrics is not None
    num_tokens = len(output.prompt_token_ids)
    print(f"\nText      {args.text.name}, {len(text.split()):,} words, begins {' '.join(text.split()[:4])!r}")
    print(f"Question  {args.question}")
    print(f"Answer    {output.outputs[0].text.strip()}\n")
    print(
        f"{output.metrics.ttft:.2f} s from a prompt of {num_tokens:,} tokens to the first token of the answer "
        f"(loading took {seconds:.1f} s)"
    )

    # A prompt that is longer than a step is computed in chunks. Each chunk is split over all ranks.
    tokens = pairs = np.zeros(num_ranks, np.int64)
    for computed in range(0, num_tokens, max_num_batched_tokens):
        length = min(max_num_batched_tokens, num_tokens - computed)
        plan = plan_step(ScheduledBatch.of([computed], [length]), TokenLayout(num_ranks))
        tokens, pairs = tokens + plan.num_tokens, pairs + plan.num_pairs
    for rank in range(num_ranks):
        print(
            f"  rank {rank} computed {tokens[rank]:,} tokens ({tokens[rank] / tokens.sum():.1%}) "
            f"and {pairs[rank]:,} attended pairs ({pairs[rank] / pairs.sum():.1%})"
        )


if __name__ == "__main__":
    main()
