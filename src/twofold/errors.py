"""What can go wrong, as one tree: what the user did (HTTP 4xx), and what we or the machine did (HTTP 5xx).

    TwofoldError
    ├── UserError                  the request or the configuration cannot be served as it stands
    │   ├── ConfigError            an engine argument
    │   ├── ModelError             a model that is missing, broken or not supported
    │   └── RequestError           one prompt or its sampling parameters; no other request is touched
    ├── OverloadedError            too much waits already; to be tried again
    └── EngineError                the engine failed
        ├── RankDiedError          a rank ended, or stopped answering
        ├── RankFailedError        a rank raised
        └── UnavailableError       the server starts, stops, or has lost its engine

Every message is one line that names the value, the limit and the way out.
"""

GIVEN_UP = "this request made the engine fail twice and was given up; no other request is affected"


class TwofoldError(Exception):
    """Base of every error that Twofold raises on purpose."""


class UserError(TwofoldError, ValueError):
    """What was asked for cannot be served; the message says what to change.

    `field` names the argument, parameter or prompt field that is wrong, where there is one.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ConfigError(UserError):
    """An engine argument is wrong."""


class ModelError(UserError):
    """A model, its weights or its tokenizer is missing, broken or not supported."""


class RequestError(UserError):
    """A prompt or its sampling parameters are wrong."""


class OverloadedError(TwofoldError):
    """The queue is full; there should be room in `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineError(TwofoldError, RuntimeError):
    """The engine failed; no user is at fault."""


class RankDiedError(EngineError):
    """A rank's process ended or stopped answering."""


class RankFailedError(EngineError):
    """A rank raised; the message carries its last line."""


class UnavailableError(EngineError):
    """No request can be taken now, or the one under way had to be given up."""
