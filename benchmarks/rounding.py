"""How far log-probabilities in bfloat16 are from those in float32: Twofold's, beside Transformers' own.

    python benchmarks/rounding.py [--len 2000] [--ranks 1,2] [--output-json F]

A prompt of English prose for the demo model. The reference is Transformers' forward pass in float32. Mean, root mean
square and largest distance of the log-probabilities of the prompt's tokens are told.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from exactness import TEXT
from transformers import AutoModelForCausalLM, AutoTokenizer

from twofold import LLM, SamplingParams
from twofold.bench.report import environment, print_table
from twofold.machine import usable_cores
from twofold.models.source import demo_directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--len", type=int, default=2000, help="tokens of the prompt")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--output-json")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(usable_cores())
    prompt = AutoTokenizer.from_pretrained(demo_directory()).encode(TEXT.read_text())[: args.len]
    exact = of_transformers(prompt, torch.float32)
    found = {"Transformers": of_transformers(prompt, torch.bfloat16)}
    for num_ranks in (int(part) for part in args.ranks.split(",")):
        found[f"Twofold, {num_ranks} ranks"] = of_twofold(prompt, num_ranks)
    rows = [{"engine": engine, **distances(logprobs - exact)} for engine, logprobs in found.items()]
    print_table(list(rows[0]), [[str(value) for value in row.values()] for row in rows])
    if args.output_json:
        result = environment() | {"tokens": len(prompt), "rows": rows}
        Path(args.output_json).write_text(json.dumps(result, indent=1) + "\n")


@torch.inference_mode()
def of_transformers(prompt: list[int], dtype: torch.dtype) -> np.ndarray:
    """Log-probabilities of the tokens from the second on; the softmax is in float32, as in Twofold."""
    model: Any = AutoModelForCausalLM.from_pretrained(demo_directory(), dtype=dtype).eval()
    ids = torch.tensor([prompt])
    hidden = model.base_model(ids, use_cache=False)[0][0]
    pieces = []
    for first in range(0, ids.shape[1] - 1, 500):
        targets = ids[0, first + 1 : first + 501]
        logits = model.get_output_embeddings()(hidden[first : first + len(targets)]).float()
        pieces.append(logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0].numpy())
    return np.concatenate(pieces)


def of_twofold(prompt: list[int], num_ranks: int) -> np.ndarray:
    with LLM("demo", dtype="bfloat16", prefill_context_parallel_size=num_ranks) as llm:
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        [output] = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    entries = zip(output.prompt_logprobs or [], prompt, strict=True)
    return np.array([entry[token].logprob for entry, token in entries if entry])


def distances(errors: np.ndarray) -> dict[str, float]:
    found = {"mean": np.abs(errors).mean(), "rms": (errors**2).mean() ** 0.5, "largest": np.abs(errors).max()}
    return {name: round(float(value), 4) for name, value in found.items()}


if __name__ == "__main__":
    main()
