"""All errors that Twofold raises: mistakes of a user (HTTP 4xx), and failures of the engine or its load (429, 5xx).

    TwofoldError
    ├── UserError                  the request or the configuration cannot be served as it stands
    │   ├── ConfigError            an argument of the engine, the server or a command
    │   ├── ModelError             a model that is missing, broken or not supported
    │   └── RequestError           one prompt or its sampling parameters; no other request is affected
    ├── OverloadedError            too many requests wait; try again later
    └── EngineError                the engine failed
        ├── RankDiedError          a rank ended, or stopped answering
        ├── RankFailedError        a rank raised
        └── UnavailableError       the server starts, stops, or its engine has failed

Every message is one line with the value, the limit and the way out.
"""

GIVEN_UP = "this request made the engine fail again and again and was given up; no other request is affected"


class TwofoldError(Exception):
    """Base of every error that Twofold raises on purpose."""


class UserError(TwofoldError, ValueError):
    """What was asked for cannot be served. The message says what to change.

    `field` is the name of the wrong argument, parameter or field, or None if there is none.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ConfigError(UserError):
    """An argument is wrong."""


class ModelError(UserError):
    """A model, its weights or its tokenizer is missing, broken or not supported."""


class RequestError(UserError):
    """A prompt or its sampling parameters are wrong."""


class OverloadedError(TwofoldError):
    """The queue is full. There should be room in `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineError(TwofoldError, RuntimeError):
    """The engine failed. It is not the user's fault."""


class RankDiedError(EngineError):
    """A rank's process ended or stopped answering."""


class RankFailedError(EngineError):
    """A rank raised an exception. The message has its last line."""


class UnavailableError(EngineError):
    """No request is accepted now, or the one under way had to be given up."""
