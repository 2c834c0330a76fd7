"""Bodies as JSON in which no key is given twice: one of the two values would be ignored."""

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from twofold.server.errors import APIError


def parse(body: bytes) -> Any:
    """Reads a body → what it says.

    Raises:
        APIError: an object has a key twice.
        ValueError: it is no JSON.
    """
    return json.loads(body, object_pairs_hook=_object)


class StrictRoute(APIRoute):
    """A route whose body is read by `parse`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return handle_strictly


class _StrictRequest(Request):
    async def json(self) -> Any:
        return parse(await self.body())


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for name, value in pairs:
        if name in members:
            shown = name[:64].encode(errors="replace").decode()
            raise APIError(400, f"the key {shown!r} is given twice in one object; give it once", param=shown)
        members[name] = value
    return members
