"""Errors as OpenAI's API answers them. A client sees no trace and no path of this machine."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from twofold.errors import EngineError, OverloadedError, UnavailableError, UserError

MAX_SHOWN = 500  # characters of a message
UNREADABLE = "the body cannot be read as JSON: it is not UTF-8, too deep, or has numbers of thousands of digits"
INTERNAL = "the server failed to process the request; it is not at fault, and may be tried again"


class APIError(Exception):
    """An error of a route: status, headers and body."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        if len(message) > MAX_SHOWN:
            message = message[:MAX_SHOWN] + " …"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def describe(error: Exception, prompt: str = "prompt") -> APIError:
    """The answer to an error. `prompt` is the name of the request's field that had the prompt."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, HTTPException) and isinstance(error.__cause__, APIError):
        return error.__cause__  # FastAPI wraps what is raised while it reads a body
    if isinstance(error, HTTPException):
        message = UNREADABLE if error.status_code == 400 else str(error.detail)
        return APIError(error.status_code, message, headers=error.headers)
    if isinstance(error, UserError):
        message, field = str(error), prompt if error.field == "prompt" else error.field
        return APIError(400, message if field is None or field in message else f"{field}: {message}", param=field)
    if isinstance(error, OverloadedError):
        headers = {"Retry-After": str(error.retry_after)}
        return APIError(429, str(error), "rate_limit_error", code="rate_limit_exceeded", headers=headers)
    if isinstance(error, UnavailableError):
        return APIError(503, str(error), "server_error", code="unavailable", headers={"Retry-After": "5"})
    if isinstance(error, EngineError):
        return APIError(500, str(error), "server_error", code="engine_failed")
    return APIError(500, INTERNAL, "server_error")


def install(app: FastAPI) -> None:
    """Sends every error of the app, its own or FastAPI's, through `describe`."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        return describe(error).response()

    for kind in (APIError, RequestValidationError, HTTPException, UserError, OverloadedError, EngineError, Exception):
        app.add_exception_handler(kind, handle)


def _invalid(error: RequestValidationError) -> APIError:
    """The answer to the first fault of a body."""
    first: dict[str, Any] = error.errors()[0]
    place = [part for part in first["loc"] if part != "body"]
    name = next((part for part in place if isinstance(part, str)), None)
    if first["type"] == "json_invalid":
        return APIError(400, f"the body is not JSON: {first['ctx']['error']} at character {place[0] if place else 0}")
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        shown = str(place[-1])[:64]
        return APIError(400, f"unknown field {shown!r}", param=shown, code="unknown_parameter")
    if first["type"] == "missing":
        message = "it is required"
    if not place and first["type"] == "missing":
        return APIError(400, "the request has no body; send JSON")
    if not place and isinstance(first["input"], bytes):
        return APIError(415, "the body is not declared as JSON; send the header Content-Type: application/json")
    if not place:
        name = first.get("ctx", {}).get("field")
        return APIError(400, message if name else f"the body: {message}", param=name)
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place if part not in _BRANCHES)
    return APIError(400, f"{where.lstrip('.')[:128]}: {message}", param=name)


_BRANCHES = {"constrained-str", "str", "list[constrained-str]", "list[str]"}  # pydantic's names for parts of unions
