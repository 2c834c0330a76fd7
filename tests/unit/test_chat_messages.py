"""What a chat becomes for a template, how its answers are read, and how calls are forced."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from test_tool_formats import AUTO, TOOLS, WEATHER, form_of, parse
from transformers.utils.chat_parsing import parse_response

from twofold.chat.answers import REASONING, AnswerFormat, answer_format
from twofold.chat.conversation import Conversation
from twofold.chat.messages import for_template
from twofold.chat.pieces import Text, Thought
from twofold.chat.tools import Tools
from twofold.errors import RequestError
from twofold.sampling_params import Reasoning
from twofold.server.anthropic import MessagesRequest
from twofold.server.responses import ResponsesRequest

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def test_parts_are_joined_or_kept_as_the_template_reads_them() -> None:
    """Guards content parts, offline and in the server: a template that loops over parts gets parts, others text."""
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert for_template(messages, "{{ message.content }}")[0]["content"] == "a\nb"
    loops = "{% for part in message['content'] %}{{ part.text }}{% endfor %}"
    assert for_template(messages, loops)[0]["content"] == [{"type": "text", "text": "a\nb"}]
    assert for_template(messages, "{% if message.content is string %}" + loops)[0]["content"] == "a\nb"
    with pytest.raises(RequestError, match=r"messages\[0\]: content: parts of type 'image_url' are not supported"):
        for_template([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "")


def test_calls_and_reasoning_are_told_as_the_template_reads_them() -> None:
    """Guards replayed answers: arguments as an object, or as text where the template adds them to text."""
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "Hm."},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ]
    assistant, tool = for_template(messages, "{{ call.function.arguments | tojson }}")
    assert assistant["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert (assistant["content"], assistant["reasoning_content"]) == ("", "Hm.")
    assert tool["name"] == "f"
    joins = for_template(messages, "{{ 'x' + tool['function']['arguments'] + 'y' }}")
    assert joins[0]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'


def tokenizer(special: tuple[str, ...] = (), **others: Any) -> Any:
    tokens = {number: SimpleNamespace(content=text, special=True) for number, text in enumerate(special)}
    return SimpleNamespace(added_tokens_decoder=tokens, **others)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("<tool_call>\n{'name'", "hermes"),
        ("<tool_call><function=f>", "qwen3_coder"),
        ("<tool_call>f<arg_key>", "glm45"),
        ("[TOOL_CALLS]", "mistral"),
        ("<｜tool▁calls▁begin｜>", "deepseek_v3"),
        ("<|channel|>commentary", "openai"),
        ("<|python_tag|>", "llama3_json"),
        ("plain", None),
    ],
)
def test_a_template_shows_the_format(template: str, name: str | None) -> None:
    """Guards `--tool-call-parser auto`."""
    found = answer_format(tokenizer(), template).tools
    assert found is (None if name is None else form_of(name).tools)
    assert answer_format(tokenizer(), template, "none").tools is None


def test_special_tokens_are_kept_for_the_format_alone() -> None:
    """Guards markers that are special tokens: the format sees them, and a client sees no special token."""
    special = ("<tool_call>", "</tool_call>", "<|pad|>")
    form = answer_format(tokenizer(special), "<tool_call>")
    assert form.keeps_special_tokens(AUTO)
    assert not form.keeps_special_tokens(Tools())
    text = f'Hi<|pad|>!<tool_call>{{"name": "get_weather", "arguments": {json.dumps(WEATHER[1])}}}</tool_call><|pad|>'
    message = parse(form, [*text[:2], text[2:9], text[9:]])
    assert (message.content, message.calls) == ("Hi!", (WEATHER,))


def test_reasoning_may_begin_in_the_prompt() -> None:
    """Guards templates that end a prompt with <think>, and those that end it with an empty thought."""
    form = AnswerFormat(reasoning=REASONING["qwen3"])
    assert parse(form, ["Hm.\n</think>\n\nYes."], prompt="x<think>\n").__dict__ == {
        "reasoning": "Hm.", "content": "Yes.", "calls": ()
    }  # fmt: skip
    assert parse(form, ["Yes."], prompt="<think>\n\n</think>\n\n").content == "Yes."
    assert parse(form, ["Hm"], prompt="x<think>").reasoning == "Hm"
    assert form.forced_prompt("x<think>\n") == "x<think>\n\n</think>\n\n"


def test_reasoning_before_a_form() -> None:
    """Guards where a form begins: by the tokens around reasoning, the prompt's end, and what the client asked for."""
    form = answer_format(tokenizer(("<think>", "</think>")), "<think></think>")
    chat = Conversation([])
    assert form.reasoning_before_form("x<think>\n", chat) == Reasoning(end=(1,))
    assert form.reasoning_before_form("x", chat) == Reasoning(end=(1,), begin=0)
    assert form.reasoning_before_form("<think>\n\n</think>\n\n", chat) is None
    assert form.reasoning_before_form("x<think>", Conversation([], effort="none")) is None
    assert form.reasoning_before_form("x", Conversation([], continue_final_message=True)) is None
    assert answer_format(tokenizer(), "<think></think>").reasoning_before_form("x<think>", chat) is None
    special = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>")
    harmony = answer_format(tokenizer(special, encode=lambda text, add_special_tokens: [77]), "<|channel|>")
    assert harmony.reasoning_before_form("<|start|>assistant", chat) == Reasoning(end=(0, 77, 1))
    text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>{}"
    for one, told, prompt in ((form, "<think>Hm.</think>{}", "x"), (harmony, text, "<|start|>assistant")):
        assert one.keeps_special_tokens(Tools(), is_constrained=True, reasons=True)
        assert not one.keeps_special_tokens(Tools(), is_constrained=True)
        parser = one.parser(prompt, Tools(), is_constrained=True, reasons=True)
        assert parser is not None
        assert [*parser.feed(told), *parser.finish()] == [Thought("Hm."), Text("{}")]


TEMPLATE: dict[str, Any] = {  # as Transformers has it for Qwen
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "content": {},
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
    },
}


def test_a_tokenizers_own_template_reads_its_answers() -> None:
    """Guards `response_template`: our pieces, and those of Hermes, are the message of Transformers' parser."""
    text = "<think>Hm.</think>Let me see.\n"
    for name in ("get_weather", "get_time"):
        text += f'<tool_call>{{"name": "{name}", "arguments": {{"city": "Köln"}}}}</tool_call>'
    prompt = "<|im_start|>assistant\n"
    expected = parse_response(text, TEMPLATE, prefix=prompt, tools=TOOLS)
    calls = tuple((call["function"]["name"], call["function"]["arguments"]) for call in expected["tool_calls"])
    forms = [AnswerFormat(response_template=TEMPLATE), form_of("hermes", reasoning=REASONING["qwen3"])]
    for form in forms:
        for deltas in ([text], list(text)):
            message = parse(form, deltas, prompt=prompt)
            assert message.calls == calls
            assert message.content.strip() == expected["content"].strip()
            assert message.reasoning == expected["reasoning_content"]


def test_a_forced_answer_is_a_list_of_calls() -> None:
    """Guards the schema of required calls: every tool's own definitions, and nothing beside name and parameters."""
    item = {"type": "object", "properties": {"x": {"$ref": "#/$defs/T"}}}
    tools = [
        {"type": "function", "function": {"name": name, "parameters": item | {"$defs": {"T": {"type": kind}}}}}
        for name, kind in (("a", "string"), ("b", "integer"))
    ]
    schema = Tools(tools, "required", at_most_one=True).answer_schema()
    assert schema is not None
    assert schema["$defs"] == {"0.T": {"type": "string"}, "1.T": {"type": "integer"}}
    assert [one["properties"]["parameters"]["properties"]["x"] for one in schema["items"]["anyOf"]] == [
        {"$ref": "#/$defs/0.T"},
        {"$ref": "#/$defs/1.T"},
    ]
    assert schema["maxItems"] == 1
    text = '[{"name": "a", "parameters": {"x": "1"}}, {"name": "b", "parameters": {"x": 2}}]'
    assert parse(AnswerFormat(), list(text), tools=Tools(tools, "required")).calls == (
        ("a", {"x": "1"}),
        ("b", {"x": 2}),
    )
    assert parse(AnswerFormat(), list(text), tools=Tools(tools, "required", at_most_one=True)).calls == (
        ("a", {"x": "1"}),
    )
    assert parse(AnswerFormat(), list('{"x": 2}'), tools=Tools(tools, "b", is_named=True)).calls == (("b", {"x": 2}),)
    for choice, named in (("required", False), ("c", True)):
        with pytest.raises(RequestError) as refused:
            Tools([], choice, is_named=named)
        assert refused.value.field == "tool_choice"


def test_responses_and_messages_become_the_same_conversation() -> None:
    """Guards the two APIs of agents: what was thought, said and called in a turn is one message, in its order."""
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'}
    thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
    said = {"role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]}
    result = {"type": "function_call_output", "call_id": "c1", "output": "2"}
    items = [{"role": "user", "content": "?"}, thought, said, call, result]
    responses = ResponsesRequest(input=items, instructions="Be brief.").conversation().messages
    blocks = [
        {"type": "thinking", "thinking": "Hm.", "signature": ""},
        {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
    ]
    turns = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": blocks},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "2"}]},
    ]
    messages = MessagesRequest(max_tokens=1, messages=turns, system="Be brief.").conversation().messages
    assert for_template(responses, "") == for_template(messages, "")
