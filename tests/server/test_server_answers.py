"""The real `openai` client against a running server: answers are those of `LLM.generate`, in OpenAI's shapes."""

import asyncio
import re
from pathlib import Path
from typing import Any

import openai
import pytest
from running import Server

from twofold import LLM, RequestOutput, SamplingParams

PROMPT = "The quick brown fox jumps over the lazy dog, and"
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0, "max_tokens": 40},
    {"temperature": 0.9, "top_p": 0.8, "seed": 5, "max_tokens": 40, "presence_penalty": 0.5},
    {"temperature": 1, "seed": 7, "max_tokens": 60, "stop": ["fox", "d"]},
]


def offline(llm: LLM, prompt: Any, params: dict[str, Any]) -> RequestOutput:
    return llm.generate(prompt, SamplingParams(**params), use_tqdm=False)[0]


@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.parametrize("stream", [False, True])
def test_completions_are_those_of_generate(server: Server, llm: LLM, params: dict[str, Any], stream: bool) -> None:
    """Guards the whole way there and back, in one piece and in chunks."""
    expected = offline(llm, PROMPT, params).outputs[0]
    with server.client() as client:
        if stream:
            chunks = list(client.completions.create(model="tiny", prompt=PROMPT, stream=True, **params))
            text = "".join(chunk.choices[0].text for chunk in chunks)
            reasons = [chunk.choices[0].finish_reason for chunk in chunks]
            assert set(reasons[:-1]) <= {None}
            assert len({chunk.id for chunk in chunks}) == 1
            reason = reasons[-1]
        else:
            completion = client.completions.create(model="tiny", prompt=PROMPT, **params)
            text, reason = completion.choices[0].text, completion.choices[0].finish_reason
            assert completion.usage is not None
            assert completion.usage.completion_tokens == len(expected.token_ids)
    assert (text, reason) == (expected.text, expected.finish_reason)


def test_chats_are_those_of_chat(server: Server, llm: LLM) -> None:
    """Guards the chat template and n, with the asynchronous client, all at once."""
    conversations = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{i} foxes"}] for i in "abc"
    ]
    params = {"temperature": 0.8, "seed": 11, "max_tokens": 20, "n": 2}
    expected = [llm.chat(one, SamplingParams(**params), use_tqdm=False)[0].outputs for one in conversations]

    async def ask_all() -> list[Any]:
        async with server.async_client() as client:
            ask = client.chat.completions.create
            return await asyncio.gather(
                *(ask(model="tiny", messages=one, **params) for one in conversations)  # type: ignore[call-overload]
            )

    for answer, outputs in zip(asyncio.run(ask_all()), expected, strict=True):
        assert [choice.message.content for choice in answer.choices] == [output.text for output in outputs]
        assert [choice.message.role for choice in answer.choices] == ["assistant"] * 2
        assert answer.object == "chat.completion"


def test_a_streamed_chat_has_openais_chunks(server: Server, llm: LLM) -> None:
    """Guards the order of chunks: role, content, finish_reason, usage; and the usage itself."""
    messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "A rank is lost"}]}]
    expected = llm.chat(
        [{"role": "user", "content": "A rank is lost"}], SamplingParams(temperature=0, max_tokens=12), use_tqdm=False
    )[0]

    async def ask() -> list[Any]:
        async with server.async_client() as client:
            stream = await client.chat.completions.create(
                model="tiny",
                messages=messages,
                temperature=0,
                max_completion_tokens=12,
                stream=True,
                stream_options={"include_usage": True},
            )
            return [chunk async for chunk in stream]

    first, *middle, last, usage = asyncio.run(ask())
    assert first.choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in middle) == expected.outputs[0].text
    assert last.choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in (first, *middle, last))
    assert usage.choices == []
    assert usage.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert usage.usage.completion_tokens == 12
    assert usage.usage.total_tokens == len(expected.prompt_token_ids) + 12


def test_cached_tokens_are_told(server: Server) -> None:
    """Guards usage.prompt_tokens_details: a prompt that was asked before is found in the cache."""
    with server.client() as client:
        ask = [client.completions.create(model="tiny", prompt=[9] * 100, max_tokens=1) for _ in range(2)]
    cached = [one.usage.prompt_tokens_details.cached_tokens for one in ask]
    assert cached == [0, 96]


def test_many_prompts_with_echo_and_logprobs(server: Server, llm: LLM) -> None:
    """Guards the legacy form of log-probabilities, the order of choices, and echo of text and of token ids."""
    params = {"temperature": 0, "max_tokens": 3}
    token_ids = [llm.engine.tokenizer.encode(text) for text in ("ab cd", "fox and dog")]
    expected = llm.generate(
        [{"prompt_token_ids": ids} for ids in token_ids],
        SamplingParams(**params, logprobs=2, prompt_logprobs=2),
        use_tqdm=False,
    )
    with server.client() as client:
        both = [
            client.completions.create(model="tiny", prompt=prompt, echo=True, logprobs=2, **params)
            for prompt in (["ab cd", "fox and dog"], token_ids)
        ]
    assert [choice.text for choice in both[0].choices] == [choice.text for choice in both[1].choices]
    for choice, text, output in zip(both[0].choices, ("ab cd", "fox and dog"), expected, strict=True):
        assert choice.text == text + output.outputs[0].text
        form = choice.logprobs
        entries = [*output.prompt_logprobs, *output.outputs[0].logprobs]
        assert form.token_logprobs[0] is None
        assert form.token_logprobs[1:] == pytest.approx([next(iter(e.values())).logprob for e in entries[1:]], abs=1e-4)
        assert form.tokens[1:] == [next(iter(entry.values())).decoded_token for entry in entries[1:]]
        assert form.text_offset == [len("".join(form.tokens[:i])) for i in range(len(form.tokens))]
        assert all(1 <= len(top) <= 3 for top in form.top_logprobs[1:])  # tokens may have the same text


def test_only_the_prompt_can_be_scored(server: Server) -> None:
    """Guards max_tokens=0 with echo, as evaluation harnesses ask."""
    with server.client() as client:
        answer = client.completions.create(model="tiny", prompt="ab cd", echo=True, logprobs=0, max_tokens=0)
    assert answer.choices[0].text == "ab cd"
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.prompt_tokens
    assert answer.usage.completion_tokens == 0


def test_chat_logprobs(server: Server) -> None:
    """Guards the content list: the sampled token, its bytes, the best ones in order."""
    with server.client() as client:
        answer = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "x"}],
            max_tokens=5,
            temperature=0,
            logprobs=True,
            top_logprobs=3,
        )
    content = answer.choices[0].logprobs.content
    assert len(content) == 5
    for token in content:
        assert bytes(token.bytes).decode(errors="replace") == token.token
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob == max(one.logprob for one in token.top_logprobs)


@pytest.mark.parametrize("stream", [False, True])
def test_the_bytes_of_tokens_make_the_text(server: Server, stream: bool) -> None:
    """Guards characters that several tokens make up: their bytes are those of the character, not of a placeholder."""
    messages: list[Any] = [{"role": "user", "content": "東京"}]
    asked: dict[str, Any] = {"max_tokens": 60, "seed": 1, "logprobs": True, "extra_body": {"ignore_eos": True}}
    with server.client() as client:
        ask = client.chat.completions.create
        if stream:
            choices = [chunk.choices[0] for chunk in ask(model="tiny", messages=messages, stream=True, **asked)]
            text = "".join(choice.delta.content or "" for choice in choices)
        else:
            choices = [ask(model="tiny", messages=messages, **asked).choices[0]]
            text = choices[0].message.content
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    assert len(tokens) == 60
    assert any("\ufffd" in token.token for token in tokens)
    assert b"".join(bytes(token.bytes) for token in tokens).decode(errors="replace") == text


def test_progress_is_told_in_comments(server: Server) -> None:
    """Guards what a person sees who waits for a long prefill; clients skip it."""
    body = {"prompt": [5] * 1500, "max_tokens": 2, "stream": True}
    (server.faults / "slow").write_text("0.1")
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    (server.faults / "slow").unlink()
    notes = [line for line in lines if line.startswith(": prefill ")]
    counts = [int(note.split()[2].partition("/")[0]) for note in notes]
    assert counts == sorted(set(counts))
    assert len(counts) >= 3
    assert all(note.endswith("/1500") for note in notes)
    assert lines[-1] == "data: [DONE]"


def test_models_and_tokens(server: Server, llm: LLM) -> None:
    """Guards the small routes."""
    with server.client() as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").object == "model"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other")
    text = "Grüße aus Köln 🦊"
    tokens = server.http.post("/tokenize", json={"prompt": text}).json()
    assert tokens["tokens"] == llm.engine.tokenizer.encode(text)
    assert tokens["count"] == len(tokens["tokens"])
    assert tokens["max_model_len"] == 2048
    assert server.http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": text}
    chat = server.http.post("/tokenize", json={"messages": [{"role": "user", "content": "x"}]}).json()
    assert chat["tokens"] == llm.chat_prompt([{"role": "user", "content": "x"}])["prompt_token_ids"]
    assert server.http.get("/version").json()["version"]


def test_the_dashboard_shows_metrics_that_exist(server: Server) -> None:
    """Guards examples/grafana.json, and the names in docs/serving.md."""
    root = Path(__file__).parents[2]
    exposed = set(re.findall(r"^twofold:(\w+)", server.http.get("/metrics").text, re.MULTILINE))
    shown = set(re.findall(r"twofold:(\w+)", (root / "examples" / "grafana.json").read_text()))
    assert shown
    assert shown <= exposed
    section = (root / "docs" / "serving.md").read_text().partition("## Metrics")[2].partition("\n## ")[0]
    first_columns = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    documented = set(re.findall(r"`(\w+)", " ".join(first_columns)))
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in exposed}
    assert documented == families


def test_metrics_count(server: Server) -> None:
    """Guards the metrics that dashboards of vLLM read, and Twofold's own."""
    names = (
        "prompt_tokens_total",
        "generation_tokens_total",
        "request_success_total",
        "time_to_first_token_seconds_count",
    )
    before = {name: server.metric(name) for name in names}
    exchanged = server.metric("exchange_bytes_total")
    with server.client() as client:
        client.completions.create(model="tiny", prompt=[3] * 50, max_tokens=7, extra_body={"ignore_eos": True})
    assert {name: server.metric(name) - before[name] for name in names} == dict(zip(names, (50, 7, 1, 1), strict=True))
    assert server.metric("exchange_bytes_total") > exchanged
    assert server.metric("partition_imbalance") >= 1
