"""Structured answers of a server, as its clients ask for them."""

import json
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from pydantic import BaseModel, Field
from running import Server, serve
from tiny import save_tiny_model

MESSAGES: list[Any] = [{"role": "user", "content": "Who are you?"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["anna", "bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}


class Person(BaseModel):
    name: Literal["anna", "bob"]
    age: Annotated[int, Field(ge=0, le=99)]


def post(server: Server, path: str, **body: Any) -> Any:
    return server.http.post(path, json={"model": "tiny", "max_tokens": 120, **body})


def test_openai_parses_an_object(server: Server) -> None:
    """Guards `parse` with a class of pydantic's, and a stream of the same."""
    client = server.client()
    answer = client.chat.completions.parse(
        model="tiny", messages=MESSAGES, response_format=Person, max_tokens=200, temperature=0
    )
    person = answer.choices[0].message.parsed
    assert isinstance(person, Person)
    assert answer.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, response_format=FORMAT, max_tokens=200, temperature=0, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert json.loads(text) == person.model_dump()


@pytest.mark.parametrize(
    ("asked", "is_right"),
    [
        ({"guided_json": SCHEMA}, lambda text: jsonschema.validate(json.loads(text), SCHEMA) is None),
        ({"guided_json": json.dumps(SCHEMA)}, lambda text: jsonschema.validate(json.loads(text), SCHEMA) is None),
        ({"guided_regex": "[a-f]{3}"}, lambda text: re.fullmatch("[a-f]{3}", text)),
        ({"guided_choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"guided_grammar": 'root ::= "a" | "b"'}, lambda text: text in "ab"),
        ({"structured_outputs": {"regex": "x{5}"}}, lambda text: text == "xxxxx"),
        ({"structured_outputs": {"choice": ["q"]}}, lambda text: text == "q"),
    ],
)
def test_every_way_to_ask(server: Server, asked: dict[str, Any], is_right: Any) -> None:
    """Guards vLLM's fields, for completions and chats."""
    asked = asked | {"max_tokens": 300}  # a random model writes many spaces where it may
    completion = post(server, "/v1/completions", prompt="hi", n=2, **asked).json()
    chat = post(server, "/v1/chat/completions", messages=MESSAGES, **asked).json()
    texts = [choice["text"] for choice in completion["choices"]] + [chat["choices"][0]["message"]["content"]]
    assert len(texts) == 3
    assert all(map(is_right, texts)), texts


def test_a_form_begins_after_the_reasoning(tmp_path: Path) -> None:
    """Guards models that reason: they may, for a form and for a call that must come; and they need not."""
    tool = {"type": "function", "function": {"name": "tell", "parameters": SCHEMA}}
    with serve(save_tiny_model(tmp_path / "model", thinks=True), tmp_path, "--served-model-name", "tiny") as server:
        tokens = server.http.post("/tokenize", json={"prompt": "</think>"}).json()["tokens"]
        asked = {
            "messages": MESSAGES,
            "logit_bias": {f"{tokens[0]}": 5},
            "max_tokens": 1000,
            "temperature": 1,
            "seed": 3,
        }
        formed = post(server, "/v1/chat/completions", **asked, response_format=FORMAT, n=4).json()
        for choice in formed["choices"]:
            assert choice["finish_reason"] == "stop"
            jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
        assert max(len(choice["message"].get("reasoning_content") or "") for choice in formed["choices"]) > 10
        called = post(server, "/v1/chat/completions", **asked, tools=[tool], tool_choice="required").json()
        message = called["choices"][0]["message"]
        jsonschema.validate(json.loads(message["tool_calls"][0]["function"]["arguments"]), SCHEMA)
        assert message["reasoning_content"]
        for quick in ({"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}):
            message = post(server, "/v1/chat/completions", **asked, response_format=FORMAT, **quick).json()
            message = message["choices"][0]["message"]
            jsonschema.validate(json.loads(message["content"]), SCHEMA)
            assert "reasoning_content" not in message
        streamed = server.client().chat.completions.create(
            model="tiny", messages=MESSAGES, response_format=FORMAT, seed=3, max_tokens=1000, stream=True,
            logit_bias={f"{tokens[0]}": 5},
        )  # fmt: skip
        deltas = [chunk.choices[0].delta for chunk in streamed if chunk.choices]
        jsonschema.validate(json.loads("".join(delta.content or "" for delta in deltas)), SCHEMA)
        assert any(getattr(delta, "reasoning_content", None) for delta in deltas)


def test_biased_and_chosen_tokens(server: Server) -> None:
    """Guards OpenAI's logit_bias, whose keys are texts, and vLLM's lists."""
    tokens = server.http.post("/tokenize", json={"prompt": "a"}).json()["tokens"]
    biased = post(server, "/v1/completions", prompt="hi", max_tokens=4, temperature=0, logit_bias={f"{tokens[0]}": 100})
    chosen = post(server, "/v1/completions", prompt="hi", max_tokens=4, allowed_token_ids=tokens)
    without = post(server, "/v1/completions", prompt="hi", max_tokens=4, allowed_token_ids=tokens, bad_words=["a"])
    assert [one.json()["choices"][0]["text"] for one in (biased, chosen)] == ["aaaa", "aaaa"]
    assert without.status_code == 400
    assert "no token may come next" in without.json()["error"]["message"]


def test_a_schema_that_cannot_be_compiled_says_where(server: Server) -> None:
    """Guards the message that a client acts on, and the field that it names."""
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"if": {}}}}}
    given = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    response = post(server, "/v1/chat/completions", messages=MESSAGES, response_format=given)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "response_format")
    assert "json cannot be compiled at /properties/a/items: Unimplemented keys" in error["message"]


HOSTILE: list[dict[str, Any]] = [
    {"guided_json": {"enum": [f"{i * 7919 % 100_003}" for i in range(25_000)]}},
    {"guided_regex": "((((a{1,100}){1,100}){1,100}){1,100}){1,100}"},
    {"guided_regex": "(a|b)*a(a|b){200}"},
    {"guided_regex": "(" * 5000 + "a" + ")" * 5000},
    {"guided_json": {"allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {}}} for j in range(3)]} for i in range(14)]}},
    {"guided_json": {"$defs": {"x": {"$ref": "#/$defs/x"}}, "$ref": "#/$defs/x"}},
    {"guided_grammar": "start: start start start"},
    {"guided_grammar": "root ::= " + '"a" | ' * 20_000 + '"b"'},
    {"guided_json": {"type": "string", "minLength": 100_000, "maxLength": 10_000_000}},
]


def test_hostile_forms_keep_nobody_waiting(server: Server) -> None:
    """Guards the bounds of compiling, and of each mask: others are answered meanwhile, and the server goes on."""
    done = threading.Event()

    def ask_others() -> list[float]:
        times = []
        while not done.is_set():
            start = time.monotonic()
            assert post(server, "/v1/completions", prompt="hi", max_tokens=2).status_code == 200
            times.append(time.monotonic() - start)
        return times

    with ThreadPoolExecutor(len(HOSTILE) + 1) as threads:
        others = threads.submit(ask_others)
        answers = list(threads.map(lambda form: post(server, "/v1/completions", prompt="hi", **form), HOSTILE))
        done.set()
        times = others.result()
    assert {answer.status_code for answer in answers} <= {200, 400}
    assert max(times) < 5, "the machine of the tests may be busy; without bounds it is minutes"


def test_structured_answers_survive_the_loss_of_a_rank(server: Server) -> None:
    """Guards answers under way, with prompts and masks of their own, when a rank is killed."""
    pattern = r"([a-z]{2,9},){40}[a-z]+"
    body = {"prompt": "hi", "max_tokens": 150, "structured_outputs": {"regex": pattern}, "temperature": 0}
    expected = [post(server, "/v1/completions", **body | {"prompt": text}).json() for text in ("hi", "ho")]
    num_before = server.metric("rank_restarts_total")
    with ThreadPoolExecutor(2) as threads:
        again = [threads.submit(post, server, "/v1/completions", **body | {"prompt": text}) for text in ("hi", "ho")]
        server.wait_for(lambda: server.metric("num_requests_running") > 0)
        time.sleep(0.2)
        server.ranks()[1].send_signal(signal.SIGKILL)
        answers = [one.result().json() for one in again]
    assert [one["choices"] for one in answers] == [one["choices"] for one in expected]
    assert server.metric("rank_restarts_total") > num_before
    for one in answers:
        text = one["choices"][0]["text"]
        assert re.fullmatch(pattern, text) or one["choices"][0]["finish_reason"] == "length"
