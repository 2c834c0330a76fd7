"""throughput: many prompts at once, in tokens and requests per second

Prompts are random token ids. The flags are those of `vllm bench throughput`.
"""

import time
from argparse import ArgumentParser, Namespace

import numpy as np

from twofold.bench.arguments import add_lengths, engine_arguments, write_json
from twofold.bench.report import describe
from twofold.flags import whole_number


def configure(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--num-prompts", type=whole_number, default=64, metavar="N", help="number of prompts (default: 64)"
    )
    add_lengths(parser, input_len=1024)


def run(args: Namespace) -> int:
    from twofold import LLM, SamplingParams

    rng = np.random.default_rng(0)
    with LLM(**engine_arguments(args, args.input_len + args.output_len + 1)) as llm:
        vocab_size = llm.engine.vocab_size
        prompts = [
            {"prompt_token_ids": rng.integers(0, vocab_size, args.input_len).tolist()} for _ in range(args.num_prompts)
        ]
        params = SamplingParams(temperature=1.0, max_tokens=args.output_len, ignore_eos=True)
        llm.generate(prompts[:1], params, use_tqdm=False)
        llm.engine.reset_prefix_cache()
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        elapsed = time.perf_counter() - start
        settings = describe(llm.engine)
    num_tokens = sum(len(o.prompt_token_ids) + len(o.outputs[0].token_ids) for o in outputs)
    result = settings | {
        "elapsed_time": elapsed,
        "num_requests": len(outputs),
        "total_num_tokens": num_tokens,
        "requests_per_second": len(outputs) / elapsed,
        "tokens_per_second": num_tokens / elapsed,
        "output_tokens_per_second": args.output_len * len(outputs) / elapsed,
    }
    print(
        f"Throughput: {result['requests_per_second']:.2f} requests/s, {result['tokens_per_second']:.2f} tokens/s, "
        f"{result['output_tokens_per_second']:.2f} output tokens/s"
    )
    write_json(args, result)
    return 0
