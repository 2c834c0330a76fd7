"""throughput: many prompts at once, tokens and requests a second

The flags are vLLM's: --num-prompts random prompts of --input-len tokens, answers of --output-len.
"""

import json
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np

from twofold.bench.report import environment
from twofold.cli.arguments import add_engine_arguments, chosen
from twofold.config import EngineConfig


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("--input-len", type=int, default=1024, help="tokens of each prompt (default: 1024)")
    parser.add_argument("--output-len", type=int, default=128, help="tokens of each answer (default: 128)")
    parser.add_argument("--num-prompts", type=int, default=64, help="prompts (default: 64)")
    parser.add_argument("--output-json", metavar="FILE", help="write every figure there")
    add_engine_arguments(parser)


def run(args: Namespace) -> int:
    from twofold import LLM, SamplingParams

    arguments = chosen(args, EngineConfig) | {"skip_tokenizer_init": True}
    arguments.setdefault("max_model_len", args.input_len + args.output_len + 1)
    rng = np.random.default_rng(0)
    with LLM(**arguments) as llm:
        vocab_size = llm.engine.vocab_size
        prompts = [
            {"prompt_token_ids": rng.integers(0, vocab_size, args.input_len).tolist()} for _ in range(args.num_prompts)
        ]
        params = SamplingParams(temperature=1.0, max_tokens=args.output_len, ignore_eos=True)
        llm.generate(prompts[:1], params, use_tqdm=False)
        llm.engine.block_pool.reset_prefix_cache()
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        elapsed = time.perf_counter() - start
        num_tokens = sum(len(o.prompt_token_ids) + len(o.outputs[0].token_ids) for o in outputs)
        result = environment() | {
            "model": args.model,
            "dtype": str(llm.engine.runtime.dtype).removeprefix("torch."),
            "pcp": llm.engine.runtime.num_ranks,
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
    if args.output_json:
        Path(args.output_json).write_text(json.dumps(result, indent=1))
    return 0
