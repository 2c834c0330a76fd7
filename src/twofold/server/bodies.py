"""Read the bodies of requests: as JSON, within limits, with the fields that a route has.

What is short is read at once. What is longer could keep all others waiting, so a helper process reads it. Whoever reads
it counts before it parses: in Python a list within lists takes 64 bytes, and an error 1,000.
"""

import json
from collections.abc import Callable, Coroutine
from itertools import accumulate
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import ValidationError

from twofold.chat.pieces import is_unicode
from twofold.server import errors
from twofold.server.errors import APIError
from twofold.server.helper import Helper, LimitError
from twofold.server.protocol import Body

READ_AT_ONCE = 32 << 10  # bytes
MAX_SECONDS = 20.0
MAX_CONTAINERS, MAX_STRINGS, MAX_DEPTH = 50_000, 200_000, 64  # objects and lists; strings, keys among them

NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
UNREADABLE = "the body cannot be read as JSON: it is not UTF-8, or has numbers of thousands of digits"


def read_json(body: bytes, model: type[Body]) -> Body:
    """What a body says, with the fields of `model`.

    Raises:
        APIError: it is too large, no JSON, has a key twice, or a field is wrong.
    """
    check_counts(body, model.max_values)
    try:
        value = json.loads(body.decode("utf-8-sig"), object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise APIError(400, f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except ValueError:
        raise APIError(400, UNREADABLE) from None
    _check_characters(body, value)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise errors.invalid(error.errors(include_url=False)[0]) from None


def _check_characters(body: bytes, value: Any) -> None:
    """Refuses lone surrogates, which are no characters. A body can have them only as escapes."""
    if b"\\u" not in body or not isinstance(value, dict):
        return
    for name, member in value.items():
        if not is_unicode(json.dumps([name, member], ensure_ascii=False)):
            shown = errors.shown(name)
            message = f"{shown} has a lone surrogate (\\ud800 to \\udfff), which is not a character"
            raise APIError(400, message, param=shown)


def check_counts(body: bytes, max_values: int) -> None:
    """Counts in what is outside of strings. It takes a few passes over the bytes, each by one function of Python's."""
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # the quotes that are left begin and end strings
    _check_count("strings and keys", plain.count(b'"') // 2, MAX_STRINGS)
    rest = b" ".join(plain.split(b'"')[::2])
    brackets = rest.translate(None, NO_BRACKETS)
    _check_count("lists and objects", brackets.count(b"[") + brackets.count(b"{"), MAX_CONTAINERS)
    _check_count("values", rest.count(b","), max_values)
    depths = accumulate(1 if bracket in b"[{" else -1 for bracket in brackets[: 2 * MAX_CONTAINERS])
    if (depth := max(depths, default=0)) > MAX_DEPTH:
        raise APIError(400, f"the body is too deep: {depth} lists and objects within each other; at most {MAX_DEPTH}")


def _check_count(name: str, number: int, limit: int) -> None:
    if number > limit:
        raise APIError(400, f"the body has too many {name}: {number}; at most {limit} are read")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a body, unless it has a key twice: one of the two values would be ignored."""
    members: dict[str, Any] = {}
    for name, value in pairs:
        if name in members:
            shown = errors.shown(name)
            raise APIError(400, f"the key {shown!r} is given twice in one object; give it once", param=shown)
        members[name] = value
    return members


class BodyReader:
    """Reads the bodies of a server's requests. Long ones wait for each other, but nobody else waits for them."""

    def __init__(self) -> None:
        self._helper = Helper(__name__, "read_json", MAX_SECONDS)
        self.close = self._helper.close

    async def read(self, body: bytes, model: type[Body]) -> Body:
        """As `read_json`; raises UnavailableError if the helper was ended."""
        if len(body) < READ_AT_ONCE:
            return read_json(body, model)
        try:
            read: Body = await self._helper.call(body, model)
        except LimitError as error:
            raise APIError(400, f"reading the body takes {error}; send a shorter one") from None
        return read


class BodyRoute(APIRoute):
    """A route whose body is read by the app's BodyReader, `app.state.bodies`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        model = self.body_field and self.body_field.field_info.annotation

        async def handle_read(request: Request) -> Response:
            return await handle(_BodyRequest(request, model))

        return handle_read


class _BodyRequest(Request):
    def __init__(self, request: Request, model: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._model = model

    async def json(self) -> Any:
        """The body as an object of the route's class, which FastAPI does not validate again."""
        return await self.app.state.bodies.read(await self.body(), self._model)
