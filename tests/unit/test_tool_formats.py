"""Calls of tools and reasoning, as models write them: every split of a text gives the same calls as the whole text."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.chat.answers import REASONING, AnswerFormat
from twofold.chat.pieces import Arguments, Call, Piece, Text, Thought
from twofold.chat.tool_formats import FORMATS
from twofold.chat.tools import Tools

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "units": {"anyOf": [{"type": "null"}]}},
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("get_weather", "get_time")
]
AUTO = Tools(TOOLS, "auto")
WEATHER: tuple[str, dict[str, Any]] = ("get_weather", {"city": 'Köln "am" Rhein', "days": 3})
CLOCK: tuple[str, dict[str, Any]] = ("get_time", {"city": "{Paris]"})
HARMONY = json.loads(Path(__file__).with_name("harmony_answers.json").read_text())  # of tests/record_harmony.py


@dataclass
class Message:
    """An answer as a client reads it."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[tuple[str, Any], ...] = ()


def read(pieces: list[Piece]) -> Message:
    message, raw = Message(), [[piece.name, ""] for piece in pieces if isinstance(piece, Call)]
    number = -1
    for piece in pieces:
        match piece:
            case Text(text):
                message.content += text
            case Thought(text):
                message.reasoning += text
            case Call():
                number += 1
            case Arguments(text):
                raw[number][1] += text
    return replace(message, calls=tuple((name, _load(arguments)) for name, arguments in raw))


def _load(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def parse(form: AnswerFormat, deltas: list[str], *, prompt: str = "", tools: Tools = AUTO) -> Message:
    parser = form.parser(prompt, tools)
    assert parser is not None
    pieces = [piece for delta in deltas for piece in parser.feed(delta)] + parser.finish()
    assert all(not isinstance(piece, Text | Thought | Arguments) or piece.text for piece in pieces)
    return read(pieces)


def _deepseek(version: str) -> str:
    if version == "v3":
        calls = [f"function<｜tool▁sep｜>{name}\n```json\n{json.dumps(args)}\n```" for name, args in (WEATHER, CLOCK)]
    else:
        calls = [f"{name}<｜tool▁sep｜>{json.dumps(args)}" for name, args in (WEATHER, CLOCK)]
    inner = "\n".join(f"<｜tool▁call▁begin｜>{call}<｜tool▁call▁end｜>" for call in calls)
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


def _each(form: str, between: str = "\n", dumps: Any = json.dumps) -> str:
    return between.join(
        form.replace("@name", name).replace("@args", dumps(arguments)) for name, arguments in (WEATHER, CLOCK)
    )


def _tags(form: str, end: str) -> Any:
    """Writes arguments as GLM and Qwen3-Coder do: strings without quotes."""

    def dumps(arguments: dict[str, Any]) -> str:
        values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
        return "\n".join(form.replace("KEY", key).replace("VALUE", value) for key, value in values.items()) + end

    return dumps


RECORDED = {  # format -> what models of its kind write: content, then two calls
    "hermes": "Let me see.\n" + _each('<tool_call>\n{"name": "@name", "arguments": @args}\n</tool_call>'),
    "hermes, another order": "Let me see." + _each('<tool_call>{"arguments": @args, "name": "@name"}</tool_call>', ""),
    "hermes, JSON within JSON": "Let me see."
    + _each('<tool_call>{"name": "@name", "arguments": @args}</tool_call>', dumps=lambda a: json.dumps(json.dumps(a))),
    "llama3_json": "<|python_tag|>" + _each('{"name": "@name", "parameters": @args}', "; "),
    "llama3_json, bare": _each('{"type": "function", "name": "@name", "parameters": @args}', "\n"),
    "mistral": "Let me see.[TOOL_CALLS] ["
    + _each('{"name": "@name", "arguments": @args, "id": "abcdefghi"}', ", ")
    + "]",
    "mistral, v11": "Let me see." + _each("[TOOL_CALLS]@name[CALL_ID]abcdefghi[ARGS]@args", ""),
    "mistral, v13": "Let me see." + _each("[TOOL_CALLS]@name[ARGS]@args", ""),
    "deepseek_v3": "Let me see.\n" + _deepseek("v3"),
    "deepseek_v31": "Let me see." + _deepseek("v31"),
    "glm45": "Let me see.\n"
    + _each(
        "<tool_call>@name\n@args</tool_call>",
        dumps=_tags("<arg_key>KEY</arg_key>\n<arg_value>VALUE</arg_value>", "\n"),
    ),
    "glm47": "Let me see."
    + _each("<tool_call>@name@args</tool_call>", "", _tags("<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>", "")),
    "qwen3_coder": "Let me see.\n"
    + _each(
        "<tool_call>\n<function=@name>\n@args</function>\n</tool_call>",
        dumps=_tags("<parameter=KEY>\nVALUE\n</parameter>", "\n"),
    ),
    "openai": "<|channel|>commentary<|message|>Let me see.<|end|>"
    "<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    f"{json.dumps(WEATHER[1])}<|call|>"
    "<|start|>assistant to=functions.get_time<|channel|>commentary json<|message|>" + json.dumps(CLOCK[1]),
}


def form_of(name: str, **others: Any) -> AnswerFormat:
    return AnswerFormat(FORMATS[name.partition(",")[0]], **others)


@pytest.mark.parametrize("name", RECORDED)
def test_calls_are_found(name: str) -> None:
    """Guards every format: both calls, with their arguments; the content before them; no marker and no space left."""
    message = parse(form_of(name), [RECORDED[name]])
    assert message.calls == (WEATHER, CLOCK)
    assert message.content == ("" if name.startswith("llama3") else "Let me see.")


NOISE = st.sampled_from(
    ["", " ", "{", "}", '"', "\\", "[", "]", ",", "<tool_call>", "</tool_call>", "name", "<", "ü🦊"]
)


def changed(text: str, noise: list[tuple[float, str]]) -> str:
    """The text with other texts put in at places from 0 to 1."""
    for place, other in noise:
        at = int(place * len(text))
        text = text[:at] + other + text[at:]
    return text


@pytest.mark.parametrize("name", RECORDED)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_split_gives_the_same(name: str, data: st.DataObject) -> None:
    """Guards streams: deltas end anywhere, also within a marker, an escape or a name; broken calls are no exception."""
    noise = data.draw(st.lists(st.tuples(st.floats(0, 1), NOISE), max_size=3))
    text = changed(RECORDED[name], noise)
    reasoning = data.draw(st.sampled_from([None, REASONING["qwen3"]]))
    if reasoning is not None:
        text = data.draw(st.sampled_from(["<think>Hm.</think>", "\n<think>\nHm", "<thin"])) + text
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=30)))
    deltas = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    form = form_of(name, reasoning=reasoning)
    assert parse(form, deltas) == parse(form, [text]) == parse(form, list(text))


@given(st.text(st.sampled_from('a b\n{}[]"<think>/\\:,')), st.sampled_from(list(FORMATS)))
@settings(max_examples=300, deadline=None)
def test_a_text_without_calls_is_content(text: str, name: str) -> None:
    """Guards answers without calls: nothing is lost of them, but white space at the ends of a broken call."""
    message = parse(form_of(name), [text])
    assert message.calls == ()
    squeeze = str.maketrans("", "", " \n")
    assert message.content.translate(squeeze) == text.translate(squeeze)
    if not text.lstrip().startswith("{"):
        assert message.content in (text, text.lstrip())


@pytest.mark.parametrize("name", HARMONY)
def test_answers_as_openai_harmony_reads_them(name: str) -> None:
    """Guards GPT-OSS: answers that openai-harmony wrote, token by token, have the parts that it read in them."""
    answer = HARMONY[name]
    message = parse(form_of("openai"), answer["deltas"], prompt=answer["prompt"])
    told = answer["messages"]
    calls = [(one["to"].removeprefix("functions."), json.loads(one["text"])) for one in told if one["to"]]
    texts = [one for one in told if not one["to"]]
    assert message.calls == tuple(calls)
    assert message.reasoning == "\n".join(one["text"] for one in texts if one["channel"] == "analysis")
    assert message.content.strip() == "\n".join(one["text"] for one in texts if one["channel"] != "analysis").strip()
