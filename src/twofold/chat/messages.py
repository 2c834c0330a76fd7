"""The messages of a chat, from OpenAI's form to what chat templates want."""

import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from twofold.errors import RequestError

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")  # one thing, by three names
_LOOPS_OVER_PARTS = re.compile(r"for\s+\w+\s+in\s+\w+(\.content|\[['\"]content['\"]\])")
_JOINS_ARGUMENTS = re.compile(r"[+~]\s*[\w.\[\]'\"]*\barguments['\"]?\]?\s*([+~]|-?\}\})")
_KNOWS_STRINGS = re.compile(r"content(['\"]\])?\s+is\s+(not\s+)?string")


def text_of(content: object) -> str:
    """The text of a message's content: a string, or parts of type "text", which are joined by line breaks.

    Raises:
        ValueError: it is neither, or has a lone surrogate.
    """
    if isinstance(content, str):
        return checked_text(content)
    texts = []
    for part in content if isinstance(content, list | tuple) and content else [None]:
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise ValueError("it must be a string or a list of {'type': 'text', 'text': ...}")
        if part["type"] != "text":
            raise ValueError(f"parts of type {part['type'][:32]!r} are not supported; prompts are text only")
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError("a text part has the fields 'type' and 'text', a string, and no others")
        texts.append(checked_text(part["text"]))
    return "\n".join(texts)


def checked_text(text: str) -> str:
    """The text; raises ValueError if it has a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it has a lone surrogate (\\ud800 to \\udfff), which is not a character") from None
    return text


def for_template(
    messages: Sequence[Mapping[str, Any]], template: str, content_format: str = "auto"
) -> list[dict[str, Any]]:
    """Messages as the template wants them.

    content_format: "string", "openai" (a list of parts), or "auto": parts if the template can read nothing else.

    Raises:
        RequestError: a message is none; `field` is "messages".
    """
    if content_format not in ("auto", "string", "openai"):
        message = f"chat_template_content_format must be auto, string or openai, got {content_format!r}"
        raise RequestError(message, field="chat_template_content_format")
    if content_format == "auto":
        only_parts = _LOOPS_OVER_PARTS.search(template) and not _KNOWS_STRINGS.search(template)
        content_format = "openai" if only_parts else "string"
    names: dict[str, str] = {}  # id of a call -> name of the tool
    return [_message(number, one, names, template, content_format) for number, one in enumerate(messages)]


def _message(
    number: int, message: Mapping[str, Any], names: dict[str, str], template: str, content_format: str
) -> dict[str, Any]:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        raise _wrong(number, f"it must have a role ({', '.join(ROLES)}), got {reprlib.repr(message)}")
    calls = message.get("tool_calls") or ()
    content = message.get("content")
    if content is None and message["role"] == "assistant" and (calls or _reasoning(message)):
        content = ""
    try:
        text = text_of(content)
    except ValueError as error:
        raise _wrong(number, f"content: {error}") from None
    plain = {name: value for name, value in message.items() if value is not None and name not in REASONING_FIELDS}
    plain |= {
        "role": "system" if message["role"] == "developer" and "developer" not in template else message["role"],
        "content": [{"type": "text", "text": text}] if content_format == "openai" else text,
    }
    if calls:
        plain["tool_calls"] = [_call(number, call, names, template) for call in calls]
    if (reasoning := _reasoning(message)) is not None:
        # GPT-OSS's template refuses content beside the thinking before a call: it would write either as thinking.
        if calls and text and "message.thinking" in template:
            plain["content"], reasoning = "", f"{reasoning}\n{text}"
        plain |= dict.fromkeys(REASONING_FIELDS, reasoning)
    if message["role"] == "tool" and (name := names.get(message.get("tool_call_id", ""))) is not None:
        plain.setdefault("name", name)
    return plain


def _reasoning(message: Mapping[str, Any]) -> str | None:
    given = (message.get(name) for name in REASONING_FIELDS)
    return next((value for value in given if isinstance(value, str) and value), None)


def _call(number: int, call: Any, names: dict[str, str], template: str) -> dict[str, Any]:
    """A call, its arguments an object; or JSON, if the template joins them to text (DeepSeek-V3's does)."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise _wrong(number, "tool_calls must be a list of {'type': 'function', 'function': {'name', 'arguments'}}")
    if isinstance(call.get("id"), str):
        names[call["id"]] = function["name"]
    arguments = function.get("arguments") or {}
    joins = _JOINS_ARGUMENTS.search(template) is not None and "arguments is string" not in template
    if isinstance(arguments, str) and not joins:
        with suppress(ValueError, RecursionError):  # a call that the model got wrong is told as it was
            arguments = json.loads(arguments)
    elif joins and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


def _wrong(number: int, message: str) -> RequestError:
    return RequestError(f"messages[{number}]: {message}", field="messages")


def check_template_takes_tools(template: str) -> None:
    """Raises RequestError for a template that would not tell the model of tools."""
    if not re.search(r"\btools\b", template):
        raise RequestError(
            "the model's chat template takes no tools, so the model would not know of them; leave them out, or serve "
            "the model with --chat-template FILE",
            field="tools",
        )


def check_continues(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, continues: bool) -> None:
    """Raises RequestError if a final message is to be continued, but there is none, or another is to begin."""
    if not continues:
        return
    if add_generation_prompt:
        message = "continue_final_message is True, and so is add_generation_prompt; set the latter to False"
        raise RequestError(message, field="continue_final_message")
    if not messages or messages[-1].get("role") != "assistant":
        message = "continue_final_message is True, but the last message is not the assistant's"
        raise RequestError(message, field="continue_final_message")
