"""Errors as OpenAI's API answers them. A client sees no trace and no path of this machine."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from twofold.errors import EngineError, OverloadedError, UnavailableError, UserError

MAX_SHOWN = 500  # characters of a message
ANTHROPIC_TYPES = {  # by status
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
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
        super().__init__(status, message)  # enough to unpickle it; the rest are attributes
        self.status, self.headers = status, dict(headers or {})
        if len(message) > MAX_SHOWN:
            message = message[:MAX_SHOWN] + " …"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @property
    def anthropic_body(self) -> dict[str, Any]:
        """The body as Anthropic's API has it."""
        kind = ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.body["error"]["message"]}}

    def response(self, path: str = "") -> JSONResponse:
        """The response to a request for `path`."""
        is_anthropic = path.startswith("/v1/messages")
        return JSONResponse(self.anthropic_body if is_anthropic else self.body, self.status, self.headers)


def describe(error: Exception, prompt: str = "prompt", form: str = "structured_outputs") -> APIError:
    """The answer to an error. The request's fields `prompt` and `form` had the prompt, and the form of the answer."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, RequestValidationError):
        return invalid(error.errors()[0])
    if isinstance(error, HTTPException) and isinstance(error.__cause__, Exception):
        return describe(error.__cause__)  # FastAPI wraps what is raised while it reads a body
    if isinstance(error, HTTPException):
        return APIError(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, UserError):
        message, field = str(error), {"prompt": prompt, "structured_outputs": form}.get(error.field or "", error.field)
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
        return describe(error).response(request.url.path)

    for kind in (APIError, RequestValidationError, HTTPException, UserError, OverloadedError, EngineError, Exception):
        app.add_exception_handler(kind, handle)


def invalid(fault: Mapping[str, Any]) -> APIError:
    """The answer to a fault that pydantic found in a body."""
    place = [part for part in fault["loc"] if part != "body"]
    name = next((part for part in place if isinstance(part, str)), None)
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "unknown":
        return APIError(400, message, param=fault["ctx"]["field"], code="unknown_parameter")
    if fault["type"] == "missing":
        message = "it is required"
    if not place and fault["type"] == "missing":
        return APIError(400, "the request has no body; send JSON")
    if not place and isinstance(fault["input"], bytes):
        return APIError(415, "the body is not declared as JSON; send the header Content-Type: application/json")
    if not place:
        name = fault.get("ctx", {}).get("field")
        return APIError(400, message if name else f"the body: {message}", param=name)
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place if part not in _BRANCHES)
    return APIError(400, f"{where.lstrip('.')[:128]}: {message}", param=name)


def shown(name: str) -> str:
    """A name that a client chose, as a message may have it."""
    return name[:64].encode(errors="replace").decode()


_BRANCHES = {"constrained-str", "str", "list[constrained-str]", "list[str]"}  # pydantic's names for parts of unions
