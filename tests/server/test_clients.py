"""Real clients ask for tools and forms, and hold conversations: `openai` and `anthropic` here, others by themselves."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from running import Server

ASK: list[Any] = [{"role": "user", "content": "Weather in Köln?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "description": "It tells.", "parameters": PARAMETERS}}
    for name in ("get_weather", "get_time")
]


def check_arguments(arguments: str) -> None:
    value = json.loads(arguments)
    assert value.keys() == {"city", "days"}
    assert isinstance(value["city"], str)
    assert 1 <= value["days"] <= 9


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as one:
        yield one


@pytest.fixture(scope="module")
def claude(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key=server.key, max_retries=0, timeout=60) as one:
        yield one


CHOICES: list[Any] = ["required", {"type": "function", "function": {"name": "get_time"}}]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_tools_of_chats(client: openai.OpenAI, choice: Any) -> None:
    """Guards calls that a grammar makes: valid arguments, the same in a stream, and a conversation that goes on."""
    body: dict[str, Any] = {
        "model": "tiny",
        "tools": TOOLS,
        "tool_choice": choice,
        "seed": 3,
        "parallel_tool_calls": False,
    }
    chat = client.chat.completions.create(messages=ASK, **body)
    message, reason = chat.choices[0].message, chat.choices[0].finish_reason
    assert (message.content, reason) == (None, "tool_calls")
    assert message.tool_calls is not None
    [call] = message.tool_calls
    assert call.type == "function"
    assert call.function.name in (["get_time"] if choice != "required" else ["get_weather", "get_time"])
    check_arguments(call.function.arguments)

    arguments, names, ids = "", [], []
    for chunk in client.chat.completions.create(messages=ASK, stream=True, **body):
        for delta in chunk.choices[0].delta.tool_calls or ():
            assert delta.index == 0
            assert delta.function is not None
            arguments += delta.function.arguments or ""
            names += [delta.function.name] if delta.function.name else []
            ids += [delta.id] if delta.id else []
        last = chunk.choices[0].finish_reason
    assert (names, arguments, last) == ([call.function.name], call.function.arguments, "tool_calls")
    assert len(ids) == 1

    answered = [*ASK, message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    after = client.chat.completions.create(model="tiny", messages=answered, tools=TOOLS, max_tokens=4)
    assert after.choices[0].finish_reason in ("length", "stop")


def test_responses(client: openai.OpenAI) -> None:
    """Guards OpenAI's responses: text is that of a chat, events build the same object, calls go on in items."""
    told = {"model": "tiny", "temperature": 0, "max_output_tokens": 8}
    chat = client.chat.completions.create(model="tiny", messages=ASK, temperature=0, max_tokens=8)
    response = client.responses.create(input=ASK, **told)  # type: ignore[call-overload]
    assert response.output_text == chat.choices[0].message.content
    assert response.usage.output_tokens == 8
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    with client.responses.stream(input="Weather in Köln?", instructions=None, **told) as stream:
        events: list[Any] = list(stream)
    kinds = [event.type for event in events]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text == response.output_text
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]


def test_tools_of_responses(client: openai.OpenAI) -> None:
    """Guards function calls as items: in a stream, and as the input of the next request."""
    tools: Any = [{"type": "function", **TOOLS[0]["function"], "strict": True}]
    body: Any = {"model": "tiny", "tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    with client.responses.stream(input=ASK, **body) as stream:
        kinds = [event.type for event in stream]
        response = stream.get_final_response()
    [item] = response.output
    assert item.type == "function_call"
    check_arguments(item.arguments)
    assert kinds[2] == "response.output_item.added"
    assert kinds[-3:] == ["response.function_call_arguments.done", "response.output_item.done", "response.completed"]
    output: Any = {"type": "function_call_output", "call_id": item.call_id, "output": "rain"}
    items: Any = [*ASK, item.model_dump(), output]
    after = client.responses.create(model="tiny", input=items, tools=tools, max_output_tokens=4)
    assert after.output_text
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="tiny", input="x", previous_response_id=response.id)
    assert refused.value.param == "previous_response_id"


def test_messages(claude: anthropic.Anthropic, client: openai.OpenAI) -> None:
    """Guards Anthropic's messages: text is that of a chat, events build the same message, tokens are counted."""
    told: Any = {"model": "tiny", "max_tokens": 8, "extra_body": {"temperature": 0}}
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "system", "content": "Be brief."}, *ASK], temperature=0, max_tokens=8
    )
    message = claude.messages.create(messages=ASK, system=system, **told)  # type: ignore[arg-type]
    assert message.content[0].text == chat.choices[0].message.content  # type: ignore[union-attr]
    assert message.stop_reason == "max_tokens"
    counted = claude.messages.count_tokens(model="tiny", messages=ASK, system=system)  # type: ignore[arg-type]
    used = message.usage
    assert counted.input_tokens == used.input_tokens + (used.cache_read_input_tokens or 0) == chat.usage.prompt_tokens  # type: ignore[union-attr]
    with claude.messages.stream(messages=ASK, system=system, **told) as stream:  # type: ignore[arg-type]
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert final.content[0].text == message.content[0].text  # type: ignore[union-attr]
    assert (kinds[0], kinds[1], kinds[-3:]) == (
        "message_start",
        "content_block_start",
        ["content_block_stop", "message_delta", "message_stop"],
    )
    stopped = claude.messages.create(messages=ASK, system=system, stop_sequences=[final.content[0].text[3:6]], **told)  # type: ignore[arg-type,union-attr]
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", final.content[0].text[3:6])  # type: ignore[union-attr]


def test_tools_of_messages(claude: anthropic.Anthropic) -> None:
    """Guards tool_use and tool_result, whole and streamed, and Anthropic's errors."""
    tools: Any = [{"name": "get_weather", "description": "It tells.", "input_schema": PARAMETERS}]
    body: Any = {
        "model": "tiny",
        "max_tokens": 400,
        "tools": tools,
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    }
    message = claude.messages.create(messages=ASK, **body)
    assert message.stop_reason == "tool_use"
    check_arguments(json.dumps(message.content[0].input))  # type: ignore[union-attr]
    with claude.messages.stream(
        messages=ASK, **body | {"tool_choice": {"type": "tool", "name": "get_weather"}}
    ) as stream:
        [call] = stream.get_final_message().content
    assert call.type == "tool_use"
    check_arguments(json.dumps(call.input))
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "rain"}]}
    thought = {"type": "thinking", "thinking": "Hm.", "signature": ""}
    turns: Any = [
        *ASK,
        {"role": "assistant", "content": [thought, {"type": "text", "text": "Let me see."}, call.model_dump()]},
        {"role": "user", "content": [result]},
    ]
    assert claude.messages.create(model="tiny", max_tokens=4, messages=turns, tools=tools).content
    with pytest.raises(anthropic.BadRequestError) as refused:
        claude.messages.create(model="tiny", max_tokens=4, messages=[])
    error = refused.value.body
    assert error["type"] == "error"  # type: ignore[index]
    assert error["error"]["type"] == "invalid_request_error"  # type: ignore[index]
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="claude", max_tokens=4, messages=ASK)


@pytest.mark.parametrize("name", ["openai", "langchain", "instructor", "litellm", "pydantic_ai", "openai_agents"])
def test_other_clients(server: Server, name: str) -> None:
    """Guards what clients make of the API: classes of pydantic's, tools, streams and loops of agents."""
    if name in ("instructor", "litellm"):
        pytest.importorskip(name, reason="scripts/setup installs it")
    command = [sys.executable, str(Path(__file__).with_name("other_clients.py")), name, server.url, "tiny"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
