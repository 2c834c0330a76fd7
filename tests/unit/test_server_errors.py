"""What a client is told of an error: the field comes with the error, and no message is parsed for it."""

import pytest

from twofold.errors import OverloadedError, RequestError, UserError
from twofold.server.errors import describe


@pytest.mark.parametrize(
    ("error", "prompt", "param", "message"),
    [
        (RequestError("max_tokens=5 is wrong", field="max_tokens"), "messages", "max_tokens", "max_tokens=5 is wrong"),
        (RequestError("the prompt is empty", field="prompt"), "prompt", "prompt", "the prompt is empty"),
        (RequestError("the prompt is empty", field="prompt"), "messages", "messages", "messages: the prompt is empty"),
        (
            RequestError("token id 9 is out of range", field="prompt"),
            "prompt",
            "prompt",
            "prompt: token id 9 is out of",
        ),
        (RequestError("seed and stop are fine"), "prompt", None, "seed and stop are fine"),
        (UserError("n is a letter"), "prompt", None, "n is a letter"),
    ],
)
def test_the_field_is_the_errors_own(error: UserError, prompt: str, param: str | None, message: str) -> None:
    """The first words of a message were once searched for names, so rewording it could change `param`."""
    told = describe(error, prompt=prompt)
    body = told.body["error"]
    assert told.status == 400
    assert (body["param"], body["type"], body["code"]) == (param, "invalid_request_error", None)
    assert body["message"].startswith(message)


def test_an_overloaded_server_says_when_to_come_back() -> None:
    """Guards the header that clients wait by."""
    told = describe(OverloadedError("too much waits", retry_after=7))
    assert (told.status, told.headers) == (429, {"Retry-After": "7"})
