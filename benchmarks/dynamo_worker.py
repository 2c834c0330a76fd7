"""Run the example of a worker for NVIDIA Dynamo under Dynamo itself: its frontend, its Rust worker, OpenAI's client.

    python benchmarks/dynamo_worker.py --python E/bin/python --output-json F

ai-dynamo pins versions that Twofold's own environment does not have, so it has one of its own, E, with Twofold in it.
Answers are compared with Transformers' `generate`.
"""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import torch
from server_common import tiny_or, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from twofold.models.source import demo_directory

ROOT = Path(__file__).parents[1]
PROMPT = "The capital of France is"
NUM_TOKENS = 24


def reference(folder: str, prompt: str) -> str:
    """What Transformers generates."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode(prompt)])
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False)
    return str(tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True))


async def try_all(url: str, expected: str, worker: psutil.Process) -> dict[str, Any]:
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    asked: Any = {"model": "model", "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}
    whole = (await client.completions.create(**asked)).choices[0]
    chunks = [chunk async for chunk in await client.completions.create(stream=True, **asked)]
    many = await asyncio.gather(*(client.completions.create(**asked) for _ in range(8)))
    word = expected[len(expected) // 2 :][:3]
    stopped = (await client.completions.create(stop=[word], **asked)).choices[0]
    chat: Any = {"model": "model", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8, "temperature": 0}
    said = (await client.chat.completions.create(logprobs=True, top_logprobs=2, **chat)).choices[0]
    assert said.logprobs is not None
    try:
        await client.completions.create(**asked | {"prompt": "dog " * 4000})
        refused = ""
    except openai.APIStatusError as error:
        refused = f"{error.status_code}"
        print(error, file=sys.stderr)
    forever = asked | {"max_tokens": 1900, "extra_body": {"ignore_eos": True}}
    endless = await client.completions.create(stream=True, **forever)
    await anext(aiter(endless))
    await endless.close()
    await asyncio.sleep(3)
    rank = next(one for one in worker.children(recursive=True) if "twofold.worker" in " ".join(one.cmdline()))
    return {
        "completion is Transformers'": whole.text == expected,
        "stream is Transformers'": "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == expected,
        "8 at once are Transformers'": all(one.choices[0].text == expected for one in many),
        "a stop string ends an answer": expected.startswith(stopped.text) and word not in stopped.text,
        "log-probabilities of a chat's tokens": len(said.logprobs.content or []) == 8,
        "a prompt that is too long is refused": refused == "400",
        "an answer ends when its client goes": rank.cpu_percent(1.0) < 10,
    }


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="of an environment with ai-dynamo and Twofold")
    parser.add_argument("--port", type=int, default=8177)
    parser.add_argument("--output-json")
    parser.add_argument("--model", default="demo", help="tiny is the tests' own: two layers of random weights")
    args = parser.parse_args()
    url = f"http://127.0.0.1:{args.port}"
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        model = str(demo_directory()) if args.model == "demo" else tiny_or(args.model, Path(folder))
        expected = reference(model, PROMPT)
        environment = os.environ | {"DYN_FILE_KV": f"{folder}/store"}
        common = ["--discovery-backend", "file"]
        frontend = ["-m", "dynamo.frontend", *common, "--http-host", "127.0.0.1", "--http-port", str(args.port)]
        worker = [str(ROOT / "examples/dynamo/twofold_engine.py"), *common, "--model", model, "--dtype", "float32"]
        processes = []
        for command in (frontend, [*worker, "--max-model-len", "2048", "--served-model-name", "model"]):
            processes.append(subprocess.Popen([args.python, *command], env=environment, stdout=sys.stderr))
            stack.callback(processes[-1].kill)
        deadline = time.monotonic() + 400
        while not _serves(url):
            assert time.monotonic() < deadline, "the worker did not register"
            assert all(one.poll() is None for one in processes), "a process has ended"
            time.sleep(0.5)
        result = asyncio.run(try_all(url, expected, psutil.Process(processes[1].pid)))
        ranks = psutil.Process(processes[1].pid).children(recursive=True)
        processes[1].send_signal(signal.SIGTERM)
        code = processes[1].wait(60)
        result["the worker ends with its ranks"] = code == 0 and not psutil.wait_procs(ranks, 5)[1]
    version = [args.python, "-c", "from importlib.metadata import version; print(version('ai-dynamo'))"]
    dynamo = subprocess.run(version, check=True, capture_output=True, text=True).stdout.strip()
    write(args, {"ai-dynamo": dynamo, "results": result})
    sys.exit(0 if all(result.values()) else 1)


def _serves(url: str) -> bool:
    try:
        return bool(httpx.get(f"{url}/v1/models", timeout=5).json()["data"])
    except (httpx.HTTPError, KeyError, ValueError):
        return False


if __name__ == "__main__":
    main()
