"""Bodies of chats, responses and messages that are nearly right: whatever they say, the answer is no 5xx."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.chat.messages import for_template
from twofold.errors import UserError
from twofold.server.anthropic import MessagesRequest
from twofold.server.bodies import read_json
from twofold.server.errors import APIError
from twofold.server.protocol import Body, ChatRequest
from twofold.server.responses import ResponsesRequest

PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
FUNCTION = {"name": "f", "description": "It does.", "parameters": PARAMETERS}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
USER = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
BODIES: dict[type[Body], dict[str, Any]] = {
    ChatRequest: {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "Hm."},
            {"role": "tool", "tool_call_id": "c", "content": "1"},
        ],
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": False,
    },
    ResponsesRequest: {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "1"},
        ],
        "tools": [{"type": "function", **FUNCTION}],
        "tool_choice": {"type": "function", "name": "f"},
        "text": {"format": {"type": "json_schema", "name": "n", "schema": PARAMETERS}},
        "reasoning": {"effort": "low"},
    },
    MessagesRequest: {
        "max_tokens": 4,
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [
            USER,
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": ""},
                    {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": [USER["content"][0]]}]},
        ],
        "tools": [{"name": "f", "input_schema": PARAMETERS}],
        "tool_choice": {"type": "tool", "name": "f"},
        "output_config": {"format": {"type": "json_schema", "schema": PARAMETERS}},
    },
}
WRONG = st.sampled_from(
    [None, True, 0, -1, 1e300, "", "\ud800", "x", [], {}, [[]], [{}], [None], {"type": "text"}, {"type": 1}, ["a", 1]]
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Ways to all values within a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in items for place in places(one, (*path, key)))]


def replaced(value: Any, place: tuple[Any, ...], other: Any) -> Any:
    if not place:
        return other
    copy = value.copy()
    copy[place[0]] = replaced(value[place[0]], place[1:], other)
    return copy


@pytest.mark.parametrize("model", BODIES, ids=lambda model: model.__name__)
@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_a_body_that_is_nearly_right_is_read_or_refused(model: type[Body], data: st.DataObject) -> None:
    """Guards the checks that no schema makes: of items, blocks, tools and choices. Nothing but a refusal is raised."""
    body: Any = BODIES[model]
    for _ in range(data.draw(st.integers(0, 2))):
        body = replaced(body, data.draw(st.sampled_from(places(body))), data.draw(WRONG))
    with suppress(APIError, UserError):
        read: Any = read_json(json.dumps(body).encode(), model)
        chat = read.conversation()
        for template in ("", "{{ 'x' + call.arguments + 'y' }}", "{% for part in message.content %}"):
            json.dumps(for_template(chat.messages, template), ensure_ascii=False).encode()
        json.dumps(chat.tools.answer_schema(), ensure_ascii=False).encode()
        read.sampling_params({})


@pytest.mark.parametrize("model", BODIES, ids=lambda model: model.__name__)
def test_the_bodies_are_right(model: type[Body]) -> None:
    """Guards the test above: what it changes is read as it is."""
    read: Any = read_json(json.dumps(BODIES[model]).encode(), model)
    assert read.conversation().tools.forced_name == "f"
    assert read.sampling_params({})
