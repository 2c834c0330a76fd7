"""Cut an answer into pieces while its text comes: content, reasoning, calls of tools.

A format is a generator. It takes text from a `Feed`, yields pieces, and yields None when it needs more text:

    feed("It rains: <tool") → Text("It rains: ")
    feed('_call>{"name": "rain"') → nothing yet
    feed(', "arguments": {"mm"') → Call("rain"), Arguments('{"mm"')

So an answer that is read at once gives the same calls as one that comes in deltas.
"""

import json
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import regex


@dataclass(frozen=True)
class Text:
    """A part of the content."""

    text: str


@dataclass(frozen=True)
class Thought:
    """A part of the reasoning."""

    text: str


@dataclass(frozen=True)
class Call:
    """A call of a tool begins; the arguments that follow are its."""

    name: str


@dataclass(frozen=True)
class Arguments:
    """A part of the JSON text of a call's arguments."""

    text: str


Piece = Text | Thought | Call | Arguments
Result = TypeVar("Result")
Steps = Generator[Piece | None, None, Result]


class Feed:
    """The text of an answer that was not read yet."""

    def __init__(self) -> None:
        self.text, self.ended = "", False

    def pass_on(self, markers: Sequence[str], make: Callable[[str], Piece] = Text) -> Steps[str | None]:
        """Passes on the text before the first of the markers, and skips that → the marker, or None at the end."""
        while True:
            start, marker = _find(self.text, markers)
            if marker is None and not self.ended:
                start -= num_begun(self.text, markers)
            if start:
                yield make(self.text[:start])
            self.text = self.text[start + len(marker or "") :]
            if marker is not None or self.ended:
                return marker
            yield None

    def read_to(self, *markers: str) -> Steps[tuple[str, str | None]]:
        """→ the text before the first of the markers, and the marker, which is skipped; None at the end."""
        longest, num_searched = max(map(len, markers)), 0
        while True:
            start, marker = _find(self.text, markers, max(0, num_searched - longest))
            if marker is not None or self.ended:
                text, self.text = self.text[:start], self.text[start + len(marker or "") :]
                return text, marker
            num_searched = len(self.text)
            yield None

    def peek(self) -> Steps[str]:
        """Skips white space → the next character, or "" at the end."""
        while not (rest := self.text.lstrip()) and not self.ended:
            yield None
        self.text = rest
        return rest[:1]

    def starts_with(self, *markers: str) -> Steps[str | None]:
        """→ the marker with which the text goes on, which is skipped, or None."""
        while not self.ended and any(marker.startswith(self.text) and marker != self.text for marker in markers):
            yield None
        found = next((marker for marker in markers if self.text.startswith(marker)), None)
        self.text = self.text.removeprefix(found or "")
        return found


def _find(text: str, markers: Iterable[str], start: int = 0) -> tuple[int, str | None]:
    """→ where the first marker begins and the marker (the longest of several there), or the end and None."""
    found = [(at, -len(marker), marker) for marker in markers if (at := text.find(marker, start)) >= 0]
    return (min(found)[0], min(found)[2]) if found else (len(text), None)


def num_begun(text: str, markers: Iterable[str]) -> int:
    """Number of last characters of a text that may begin a marker."""
    return max(
        (
            size
            for marker in markers
            for size in range(min(len(marker) - 1, len(text)), 0, -1)
            if text.endswith(marker[:size])
        ),
        default=0,
    )


# JSON

_PLAIN = {  # in a string, in a list or object, in a number or word -> what changes nothing there
    "string": re.compile(r'[^"\\]*'),
    "nested": re.compile(r'[^"\[\]{}]*'),
    "scalar": re.compile(r"[^,\]}\s]*"),
}


def json_value(feed: Feed) -> Generator[str | None, None, bool]:
    """Yields the text of one JSON value as it comes, and None when it needs more → whether it is whole."""
    first = yield from _texts(feed.peek())
    if not first:
        return False
    depth, state, at = 0, "nested" if first in '[{"' else "scalar", 0
    escaped = False
    while True:
        text = feed.text
        while at < len(text):
            if escaped:
                at, escaped = at + 1, False
                continue
            match = _PLAIN[state].match(text, at)
            assert match is not None
            at = match.end()
            if at == len(text):
                break
            if state == "scalar":
                feed.text = text[at:]
                yield text[:at]
                return True
            char, at = text[at], at + 1
            if char == "\\":
                escaped = state == "string"
            elif char == '"':
                state = "nested" if state == "string" else "string"
            else:
                depth += 1 if char in "[{" else -1
            if not depth and state == "nested":
                feed.text = text[at:]
                yield text[:at]
                return True
        feed.text, at = "", 0
        if text:
            yield text
        if feed.ended:
            return state == "scalar"
        yield None


def _texts(steps: Steps[Result]) -> Generator[None, None, Result]:
    """Steps that yield no piece."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Result = end.value
            return result
        yield None


def read_json(feed: Feed) -> Generator[None, None, str]:
    """→ the text of one JSON value; of one that does not end, all that is left."""
    parts = []
    for part in json_value(feed):
        if part is None:
            yield None
        else:
            parts.append(part)
    return "".join(parts)


def load(text: str) -> Any:
    """A JSON value, or None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def dump(value: Any) -> str:
    """The JSON text of a value."""
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() or is_unicode(text) else json.dumps(value)


def is_unicode(text: str) -> bool:
    """Whether a text can be sent: a lone surrogate is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# Calls

_HEAD = regex.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)', regex.DOTALL
)


def json_arguments(feed: Feed) -> Steps[None]:
    """A JSON value → Arguments."""
    for part in json_value(feed):
        yield None if part is None else Arguments(part)


def json_call(feed: Feed, opener: str = "") -> Steps[bool]:
    """{"name": ..., "arguments": {...}} → a call; `parameters` are arguments, too. What is no call is text.

    Arguments are passed on as they come if they come last. `opener` stood before: it is text if this is no call.
    """
    while (head := _HEAD.match(feed.text, partial=True)) is not None and head.partial and not feed.ended:
        yield None
    if head is not None and not head.partial:
        feed.text = feed.text[head.end() :]
        yield Call(_sendable(load(head[1]) or head[1][1:-1]))
        yield from json_arguments(feed)
        yield from _skip_members(feed)
        return True
    text = yield from read_json(feed)
    value = load(text)
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or not {"arguments", "parameters"} & value.keys():
        yield Text(opener + text)
        return False
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):  # some models write JSON within JSON
        arguments = load(arguments) or arguments
    yield Call(_sendable(name))
    yield Arguments(dump({} if arguments is None else arguments))
    return True


def _skip_members(feed: Feed) -> Steps[None]:
    """Skips the members of an object that follow the arguments of a call, and its end."""
    while (yield from feed.peek()) == ",":
        feed.text = feed.text[1:]
        yield from read_json(feed)
        if (yield from feed.peek()) == ":":
            feed.text = feed.text[1:]
            yield from read_json(feed)
    if feed.text.startswith("}"):
        feed.text = feed.text[1:]


def json_calls(feed: Feed, opener: str = "") -> Steps[None]:
    """[{"name": ..., "arguments": {...}}, ...] → calls. What is no list of calls is text."""
    if (yield from feed.peek()) == "[":
        feed.text = feed.text[1:]
        opener += "["
    while (yield from feed.peek()) == "{":
        yield from json_call(feed, opener)
        opener = ""
        if (yield from feed.peek()) == ",":
            feed.text = feed.text[1:]
    if feed.text.startswith("]"):
        feed.text = feed.text[1:]
    elif opener:
        yield Text(opener)


def _sendable(text: str) -> str:
    return text.encode(errors="replace").decode()
