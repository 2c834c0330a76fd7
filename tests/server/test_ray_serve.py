"""Two replicas under Ray Serve LLM, and OpenAI's and Anthropic's clients."""

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import anthropic
import openai
import pytest
import torch
from ray_cluster import Application, run_application, wait_until
from transformers import AutoModelForCausalLM, AutoTokenizer

ENGINE = {"dtype": "float32", "kv_cache_memory_bytes": 20_000_000, "max_num_batched_tokens": 256}
ROUTER = {"request_router_class": "ray.serve.llm.request_router.PrefixCacheAffinityRouter"}
NUM_TOKENS = 1000


@pytest.fixture(scope="module")
def application(tiny_model: Path) -> Iterator[Application]:
    model = {
        "model_loading_config": {"model_id": "tiny", "model_source": str(tiny_model)},
        "accelerator_config": {"kind": "cpu"},
        "engine_kwargs": ENGINE,
        "deployment_config": {"num_replicas": 2, "request_router_config": ROUTER, "health_check_period_s": 1},
    }
    config = {"llm_configs": [model], "ingress_deployment_config": {"num_replicas": 1}}
    with run_application(config) as running:
        yield running


def complete(application: Application, prompt: str, **options: object) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 8} | options
    response = application.http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Callable[[str], str]:
    """What Transformers generates after a prompt."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tiny = AutoModelForCausalLM.from_pretrained(tiny_model).eval()

    def generate(prompt: str, num_tokens: int = 8) -> str:
        ids = torch.tensor([tokenizer.encode(prompt)])
        new = tiny.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False)
        return str(tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True))

    return generate


def test_answers_are_those_of_transformers(application: Application, model: Callable[[str], str]) -> None:
    prompt, client = "The quick brown fox jumps", application.client
    assert complete(application, prompt)["choices"][0]["text"] == model(prompt)
    chat = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 8, "temperature": 0}
    expected = model(f"<|user|>{prompt}<eos><|assistant|>")
    assert client.chat.completions.create(model="tiny", **chat).choices[0].message.content == expected
    chunks = client.chat.completions.create(model="tiny", stream=True, **chat)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    response = client.responses.create(model="tiny", input=prompt, max_output_tokens=8, temperature=0)
    assert response.output_text == expected
    with anthropic.Anthropic(base_url=application.url, api_key="none", max_retries=0) as claude:
        asked: Any = {"messages": chat["messages"], "max_tokens": 8, "extra_body": {"temperature": 0}}
        message = claude.messages.create(model="tiny", **asked)
        assert message.content[0].text == expected
    tokens = application.http.post("/tokenize", json={"prompt": prompt}).json()["tokens"]
    assert application.http.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == prompt
    assert [one.id for one in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_errors_are_those_of_the_server(application: Application) -> None:
    def post(path: str, body: Any) -> tuple[int, dict[str, Any]]:
        response = application.http.post(path, content=body if isinstance(body, bytes) else json.dumps(body))
        return response.status_code, response.json()["error"]

    status, error = post("/v1/completions", {"prompt": "a", "best_of": 2})
    assert (status, error["param"]) == (400, "best_of")
    assert post("/v1/completions", b"{")[0] == 400
    assert post("/v1/completions", {"model": "other", "prompt": "a"})[1]["code"] == "model_not_found"
    assert post("/v1/embeddings", {"input": "a"}) == (404, ANY)
    assert post("/v1/nothing", {})[0] == 404
    message = application.http.post("/v1/messages", json={"model": "tiny"}).json()
    assert message["type"] == "error"


def test_equal_beginnings_go_to_the_replica_that_has_them(application: Application) -> None:
    """With Ray's PrefixCacheAffinityRouter, as documented for LLMConfig."""
    prefixes = [f"{letter} " * 100 for letter in "abcd"]
    for prefix in prefixes:
        complete(application, prefix)
    cached = [
        complete(application, f"{prefix}{number}")["usage"]["prompt_tokens_details"]["cached_tokens"]
        for number in range(3)
        for prefix in prefixes
    ]
    assert min(cached) >= 90, cached
    ids = list(range(5, 105))
    complete(application, ids)  # type: ignore[arg-type]
    assert complete(application, ids)["usage"]["prompt_tokens_details"]["cached_tokens"] >= 90  # type: ignore[arg-type]


async def read(application: Application, number: int, begun: asyncio.Event) -> tuple[int, str]:
    """→ tokens until the end of a stream, and the error it ended with."""
    num_tokens = 0
    asked: Any = {"prompt": f"{number} dogs", "max_tokens": NUM_TOKENS, "extra_body": {"ignore_eos": True}}
    async with application.async_client() as client:
        try:
            stream = await client.completions.create(
                model="tiny", stream=True, stream_options={"include_usage": True}, **asked
            )
            async for chunk in stream:
                begun.set()
                if chunk.usage is not None:
                    num_tokens = chunk.usage.completion_tokens
        except openai.APIError as error:
            return num_tokens, str(error)
    return num_tokens, ""


def test_a_killed_replica_ends_its_streams_only_and_comes_back(application: Application) -> None:
    assert len(application.replicas()) == 2
    victim = application.replicas()[0]
    ranks = victim.children(recursive=True)

    async def run() -> list[tuple[int, str]]:
        begun = [asyncio.Event() for _ in range(6)]
        tasks = [asyncio.create_task(read(application, i, event)) for i, event in enumerate(begun)]
        async with asyncio.timeout(60):
            await asyncio.gather(*(event.wait() for event in begun))
        victim.kill()
        during = asyncio.to_thread(complete, application, "while one replica is lost")
        return [*await asyncio.gather(*tasks), (len((await during)["choices"]), "")]

    *streams, during = asyncio.run(run())
    lost = [error for _, error in streams if error]
    assert 0 < len(lost) < 6, streams
    assert all("replica that answered was lost" in error for error in lost)
    assert all(num_tokens == NUM_TOKENS for num_tokens, error in streams if not error)
    assert during == (1, "")
    wait_until(lambda: not any(one.is_running() for one in ranks))
    wait_until(lambda: len(application.ranks()) == 2)
    for number in range(4):
        complete(application, f"{number} foxes")


def seconds_of_ranks(application: Application) -> float:
    """Processor time that the ranks have had, once they are idle."""
    ranks, before = application.ranks(), -1.0
    while (now := sum(sum(rank.cpu_times()[:2]) for rank in ranks)) > before + 0.02:
        before = now
        time.sleep(0.5)
    return now


def test_a_client_that_goes_away_ends_its_request(application: Application) -> None:
    body = {"prompt": "x", "max_tokens": 600, "stream": True, "ignore_eos": True}
    spent = [seconds_of_ranks(application)]
    for num_lines in (10_000, 1):
        with application.http.stream("POST", "/v1/completions", json=body) as response:
            for _ in itertools.islice(response.iter_lines(), num_lines):
                pass
        spent.append(seconds_of_ranks(application))
    whole, begun = (after - before for before, after in itertools.pairwise(spent))
    assert begun < whole / 2
