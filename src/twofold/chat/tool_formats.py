"""The ways in which models write calls of tools. To add one: a generator (see pieces.py), and a line of FORMATS."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from twofold.chat.pieces import (
    Arguments,
    Call,
    Feed,
    Steps,
    Text,
    Thought,
    dump,
    json_arguments,
    json_call,
    json_calls,
    load,
)

Schemas = Mapping[str, Mapping[str, Any]]  # name of a tool -> the JSON schema of its parameters


def hermes(feed: Feed, schemas: Schemas) -> Steps[None]:
    """<tool_call>{"name": "f", "arguments": {...}}</tool_call>"""
    while (opener := (yield from feed.pass_on(["<tool_call>"]))) is not None:
        yield from json_call(feed, opener)
        yield from feed.peek()
        yield from feed.starts_with("</tool_call>")


def llama3_json(feed: Feed, schemas: Schemas) -> Steps[None]:
    """{"name": "f", "parameters": {...}}; {"name": ...: the whole answer, sometimes after <|python_tag|>"""
    opener = (yield from feed.starts_with("<|python_tag|>")) or ""
    while (yield from feed.peek()) == "{" and (yield from json_call(feed, opener)):
        if (yield from feed.peek()) in (";", ","):
            feed.text = feed.text[1:]
        opener = (yield from feed.starts_with("<|python_tag|>")) or ""
    yield from feed.pass_on([])


def mistral(feed: Feed, schemas: Schemas) -> Steps[None]:
    """[TOOL_CALLS][{"name": "f", "arguments": {...}}, ...], or [TOOL_CALLS]f[CALL_ID]id[ARGS]{...} for each call"""
    while (opener := (yield from feed.pass_on(["[TOOL_CALLS]"]))) is not None:
        if (yield from feed.peek()) in ("[", "{"):
            yield from json_calls(feed, opener)
            continue
        name, marker = yield from feed.read_to("[CALL_ID]", "[ARGS]", "{")
        if marker is None:
            yield Text(opener + name)
            return
        if marker == "[CALL_ID]":
            yield from feed.read_to("[ARGS]")
        elif marker == "{":
            feed.text = "{" + feed.text
        yield Call(name.strip())
        yield from json_arguments(feed)


def deepseek(feed: Feed, schemas: Schemas) -> Steps[None]:
    """begin, then for each call: f, separator, {...} (V3.1); or "function", separator, f, ```json {...} ``` (V3, R1)"""
    begin, end = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    call_begin, separator, call_end = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
    while (yield from feed.pass_on([begin, call_begin])) is not None:
        yield from feed.peek()
        yield from feed.starts_with(call_begin)
        name, marker = yield from feed.read_to(separator)
        if marker is None:
            yield Text(name)
            return
        if name.strip() == "function" and (yield from feed.peek()) != "{":
            name, _ = yield from feed.read_to("```json")
        yield Call(name.strip())
        yield from json_arguments(feed)
        yield from feed.read_to(call_end)
        yield from feed.peek()
        yield from feed.starts_with(end)


def glm45(feed: Feed, schemas: Schemas) -> Steps[None]:
    """<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value>...</tool_call>"""
    while (opener := (yield from feed.pass_on(["<tool_call>"]))) is not None:
        name, marker = yield from feed.read_to("<arg_key>", "</tool_call>")
        if marker is None:
            yield Text(opener + name)
            return
        yield Call(name := name.strip())
        opened = "{"
        while marker == "<arg_key>":
            key, _ = yield from feed.read_to("</arg_key>")
            yield from feed.read_to("<arg_value>")
            value, marker = yield from feed.read_to("</arg_value>")
            if marker is None:
                return
            yield Arguments(f"{opened}{dump(key.strip())}: {dump(typed(value, schemas, name, key.strip()))}")
            opened = ", "
            _, marker = yield from feed.read_to("<arg_key>", "</tool_call>")
        yield Arguments("{}" if opened == "{" else "}")


def qwen3_coder(feed: Feed, schemas: Schemas) -> Steps[None]:
    """<tool_call><function=f><parameter=a>1</parameter>...</function></tool_call>"""
    while (opener := (yield from feed.pass_on(["<tool_call>", "<function="]))) is not None:
        yield from feed.peek()
        if opener == "<tool_call>" and (yield from feed.starts_with("<function=")) is None:
            yield Text(opener)
            continue
        name, marker = yield from feed.read_to(">")
        if marker is None:
            yield Text(f"<function={name}")
            return
        yield Call(name := name.strip())
        opened = "{"
        while True:
            _, marker = yield from feed.read_to("<parameter=", "</function>", "</tool_call>")
            if marker != "<parameter=":
                break
            key, _ = yield from feed.read_to(">")
            value, marker = yield from feed.read_to("</parameter>")
            if marker is None:
                return
            value = value.removeprefix("\n").removesuffix("\n")
            yield Arguments(f"{opened}{dump(key.strip())}: {dump(typed(value, schemas, name, key.strip()))}")
            opened = ", "
        yield Arguments("{}" if opened == "{" else "}")
        if marker == "</function>":
            yield from feed.peek()
            yield from feed.starts_with("</tool_call>")


def harmony(feed: Feed, schemas: Schemas) -> Steps[None]:
    """<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>commentary to=functions.f<|message|>{...}

    GPT-OSS writes its reasoning in the same way, and its answer to the channel "final".
    """
    end: str | None = ""
    last: type[Text | Thought | Arguments] | None = None
    while end is not None:
        header, marker = yield from feed.read_to("<|message|>")
        if marker is None:
            yield Text(header)
            return
        recipient = re.search(r"to=functions\.([\w.-]+)", header)
        if recipient is not None:
            yield Call(recipient[1])
        kind = Arguments if recipient is not None else Thought if "<|channel|>analysis" in header else Text
        if kind is last and kind is not Arguments:
            yield kind("\n")  # two messages of a kind are not one sentence
        last = kind
        end = yield from feed.pass_on(["<|end|>", "<|call|>", "<|return|>"], kind)


def typed(text: str, schemas: Schemas, tool: str, parameter: str) -> Any:
    """The value of a parameter that a model wrote without quotes: a string, unless its schema says otherwise."""
    properties = schemas.get(tool, {}).get("properties")
    types = _types(properties.get(parameter)) if isinstance(properties, Mapping) else set()
    if not types or ("string" in types and not (text == "null" and "null" in types)):
        return text
    words = {"True": True, "False": False, "None": None, "null": None}
    if text.strip() in words:
        return words[text.strip()]
    value = load(text)
    return text if value is None else value


def _types(schema: Any) -> set[str]:
    if not isinstance(schema, Mapping):
        return set()
    named = schema.get("type", [])
    types = {named} if isinstance(named, str) else {one for one in named if isinstance(one, str)}
    for branches in (schema.get("anyOf"), schema.get("oneOf")):
        types.update(*(map(_types, branches) if isinstance(branches, list) else ()))
    return types


@dataclass(frozen=True)
class ToolFormat:
    """A way to write calls.

    tokens: what it needs to see of tokens that are otherwise left out of the text.
    shown_by: what a chat template has somewhere, if its model writes calls in this way.
    short_ids: whether templates want the ids of calls to be nine letters and digits.
    """

    parse: Callable[[Feed, Schemas], Steps[None]]
    tokens: tuple[str, ...]
    shown_by: str
    short_ids: bool = False


_QWEN3_CODER = ToolFormat(qwen3_coder, ("<tool_call>", "</tool_call>"), r"<function=")
_DEEPSEEK = ToolFormat(
    deepseek,
    tuple(f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")),
    r"<｜tool▁calls▁begin｜>",
)
_GLM45 = ToolFormat(
    glm45,
    ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    r"<arg_key>",
)
FORMATS = {  # by vLLM's names; of those that a template shows, the first one counts
    "openai": ToolFormat(
        harmony,
        tuple(f"<|{name}|>" for name in ("start", "channel", "message", "constrain", "end", "call", "return")),
        r"<\|channel\|>",
    ),
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v31": _DEEPSEEK,
    "glm45": _GLM45,
    "glm47": _GLM45,
    "qwen3_coder": _QWEN3_CODER,
    "qwen3_xml": _QWEN3_CODER,
    "mistral": ToolFormat(mistral, ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"), r"\[TOOL_CALLS\]", short_ids=True),
    "hermes": ToolFormat(hermes, ("<tool_call>", "</tool_call>"), r"<tool_call>"),
    "llama3_json": ToolFormat(
        llama3_json, ("<|python_tag|>",), r'<\|python_tag\|>|"parameters": dictionary of argument'
    ),
}
