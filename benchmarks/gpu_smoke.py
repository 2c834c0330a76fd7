"""A first look on a GPU machine: engine against Transformers in float32 and bfloat16, decode speed."""

import sys
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from twofold import LLM, SamplingParams


def main() -> None:
    folder = "/tmp/twofold-smoke"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, max_position_embeddings=8192, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).float().eval()
    model.save_pretrained(folder)
    model = model.cuda()
    prompts = [torch.randint(0, 49152, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 7, 500)]
    with torch.inference_mode():
        expected = [
            model.generate(torch.tensor([p]).cuda(), do_sample=False, max_new_tokens=16, eos_token_id=None)[
                0, len(p) :
            ].tolist()
            for p in prompts
        ]
    sizes = [int(size) for size in sys.argv[1].split(",")]
    for eager in (True, False):
        for size in sizes:
            for dtype in ("float32", "bfloat16"):
                start = time.perf_counter()
                with LLM(
                    folder, prefill_context_parallel_size=size, dtype=dtype, skip_tokenizer_init=True,
                    enforce_eager=eager, gpu_memory_utilization=0.3, max_num_seqs=32, max_num_batched_tokens=8192,
                ) as llm:  # fmt: skip
                    ready = time.perf_counter() - start
                    outs = llm.generate(
                        [{"prompt_token_ids": p} for p in prompts],
                        SamplingParams(temperature=0, max_tokens=16, ignore_eos=True), use_tqdm=False,
                    )  # fmt: skip
                    same = [o.outputs[0].token_ids == e for o, e in zip(outs, expected, strict=True)]
                    print(
                        f"P={size} eager={eager} {dtype}: ready {ready:.1f}s equal to Transformers float32: {same}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
