"""Pass requests of clients on to replicas: what the ingress sends, and how a replica has its app answer."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message

from twofold.server.bodies import check_counts
from twofold.server.protocol import MAX_TOKEN_IDS

MAX_ROUTED_CHARS = 1 << 16  # of a prompt's beginning that routers see
_INPUTS = ("tools", "system", "instructions", "prompt", "input", "messages", "tokens")  # in the order of most templates
_TEXTS = ("name", "description", "text", "content", "function", "parameters", "input_schema", "arguments")


@dataclass(frozen=True, slots=True)
class Forwarded:
    """A client's request on its way to a replica.

    `prompt` is for Ray's request routers, which stay in the ingress: text that two requests share as far as they share
    the beginning of a prompt. It is never empty (Ray's `PrefixCacheAffinityRouter` divides by its length).
    """

    model: str
    path: str
    body: bytes
    prompt: str = field(default="", compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return Forwarded, (self.model, self.path, self.body)


@dataclass(frozen=True, slots=True)
class Head:
    """The beginning of an answer. Its body follows in pieces, as bytes."""

    status: int
    headers: list[tuple[str, str]]

    @property
    def is_stream(self) -> bool:
        return dict(self.headers).get("content-type", "").startswith("text/event-stream")


def read_fields(body: bytes) -> dict[str, Any]:
    """The fields of a body, as far as they can be read: what is wrong with others a replica will say.

    Raises:
        APIError: it is too large to be read.
    """
    check_counts(body, MAX_TOKEN_IDS)
    with suppress(ValueError, RecursionError):
        fields = json.loads(body)
        if isinstance(fields, dict):
            return fields
    return {}


def routed_text(fields: Mapping[str, Any], otherwise: str) -> str:
    """The `prompt` of a `Forwarded`."""
    pieces: list[str] = []
    num_chars = 0
    for text in _texts([fields[name] for name in _INPUTS if name in fields]):
        pieces.append(text)
        num_chars += len(text)
        if num_chars >= MAX_ROUTED_CHARS:
            break
    return "".join(pieces)[:MAX_ROUTED_CHARS] or otherwise


def _texts(value: Any) -> Iterator[str]:
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, int):
            yield f"{value} "
        elif isinstance(value, list):
            stack += reversed(value[:MAX_ROUTED_CHARS])
        elif isinstance(value, dict):
            stack += [value[name] for name in reversed(_TEXTS) if name in value]


async def call(app: ASGIApp, path: str, headers: Mapping[str, str], body: bytes) -> AsyncIterator[Head | bytes]:
    """An app's answer to a POST. Pieces that were not taken in time are joined.

    When the iteration ends early, the app is cancelled, as it is when a client goes away.
    """
    own = {"content-type": "application/json"} | {name.lower(): value for name, value in headers.items()}
    own["content-length"] = str(len(body))
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in own.items()],
        "client": None,
        "server": None,
    }
    requests: asyncio.Queue[Message] = asyncio.Queue()
    requests.put_nowait({"type": "http.request", "body": body, "more_body": False})
    answers: asyncio.Queue[Message | None] = asyncio.Queue()

    async def run() -> None:
        try:
            await app(scope, requests.get, answers.put)
        finally:
            answers.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        while (message := await answers.get()) is not None:
            if message["type"] == "http.response.start":
                names = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in message["headers"]]
                yield Head(message["status"], names)
                continue
            pieces = [message["body"]]
            while not answers.empty() and (message := answers.get_nowait()) is not None:
                pieces.append(message["body"])
            if piece := b"".join(pieces):
                yield piece
            if message is None:
                break
        await task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
