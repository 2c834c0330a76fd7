"""Check every request before its route: the API key, and the size of the body. Give every answer an id."""

import contextlib
import hmac
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twofold.server.errors import APIError

MAX_ID_BYTES = 256


class ApiKey:
    """Refuses requests without one of the keys, but to /health.

    A key comes as `Authorization: Bearer KEY`, or as Anthropic's clients send it: `x-api-key: KEY`.
    """

    def __init__(self, app: ASGIApp, keys: list[str]) -> None:
        self.app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health" and not self._knows(scope):
            error = APIError(
                401,
                "the API key is missing or wrong; send it once, as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error.response(scope["path"])(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        given += [b"bearer " + value for name, value in scope["headers"] if name == b"x-api-key"]
        if len(given) != 1:  # of two headers, a proxy may have checked the other one
            return False
        scheme, _, key = given[0].partition(b" ")
        num_equal = sum(hmac.compare_digest(key.strip(), known) for known in self._keys)  # all, in constant time
        return scheme.lower() == b"bearer" and num_equal > 0


class RequestId:
    """Gives every answer the header `x-request-id`: the request's own, if it has one that can be one.

    Anthropic's clients read it from `request-id`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        is_fine = 0 < len(given) <= MAX_ID_BYTES and all(0x20 < byte < 0x7F for byte in given)
        request_id = given if is_fine else uuid4().hex.encode()
        names = [b"x-request-id", *([b"request-id"] if scope["path"].startswith("/v1/messages") else [])]

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((name, request_id) for name in names)]
            await send(message)

        await self.app(scope, receive, send_with_id)


class BodyLimit:
    """Refuses bodies of more than `max_bytes`, before and while they are read."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        error = APIError(413, f"the body is larger than {self.max_bytes} bytes", headers={"Connection": "close"})
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if length.isdigit() and int(length) > self.max_bytes:
            await error.response(scope["path"])(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_bytes:
                raise error
            return message

        async def unless_refused(message: Message) -> None:  # the framework would answer to a broken body itself
            if num_bytes <= self.max_bytes:
                await send(message)

        with contextlib.suppress(APIError):
            await self.app(scope, counted, unless_refused)
        if num_bytes > self.max_bytes:
            await error.response(scope["path"])(scope, receive, send)
