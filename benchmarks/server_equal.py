"""Check that the `openai` client, sync and async, streaming and not, gets the answers of `LLM.generate`.

python benchmarks/server_equal.py --model demo -pcp 2 --requests 16 --output-json F
"""

import asyncio
import sys
from typing import Any

from server_common import Server, alone, arguments, requests, start, stream, write

from twofold import LLM, SamplingParams


async def at_once(server: Server, bodies: list[dict[str, Any]], streaming: bool) -> list[list[str]]:
    async with server.async_client(timeout=600) as client:
        if streaming:
            return [reading.texts for reading in await asyncio.gather(*(stream(client, body) for body in bodies))]
        answers = await asyncio.gather(*(client.completions.create(**body) for body in bodies))
        return [[choice.text for choice in answer.choices] for answer in answers]


def one_by_one(server: Server, bodies: list[dict[str, Any]]) -> list[list[str]]:
    answers = [[""] * body.get("n", 1) for body in bodies]
    with server.client(timeout=600) as client:
        for body, texts in zip(bodies, answers, strict=True):
            for chunk in client.completions.create(**body, stream=True):
                for choice in chunk.choices:
                    texts[choice.index] += choice.text
    return answers


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--requests", type=int, default=16)
    args = parser.parse_args()
    bodies = requests(args, args.requests)
    sampling = [{k: v for k, v in body.items() if k not in ("model", "prompt", "extra_body")} for body in bodies]
    params = [SamplingParams(**one, **body["extra_body"]) for one, body in zip(sampling, bodies, strict=True)]
    with LLM(args.model, prefill_context_parallel_size=1, max_model_len=4096) as llm:
        offline = llm.generate([body["prompt"] for body in bodies], params, use_tqdm=False)
    expected = [[one.text for one in output.outputs] for output in offline]
    with start(args) as server:
        ways = {
            "sync": alone(server, bodies),
            "sync, streaming": one_by_one(server, bodies),
            "async": asyncio.run(at_once(server, bodies, False)),
            "async, streaming": asyncio.run(at_once(server, bodies, True)),
        }
    equal = {way: sum(a == b for a, b in zip(texts, expected, strict=True)) for way, texts in ways.items()}
    write(args, {"requests": len(bodies), "offline_ranks": 1, "server_ranks": args.pcp, "equal": equal})
    return 0 if set(equal.values()) == {len(bodies)} else 1


if __name__ == "__main__":
    sys.exit(main())
