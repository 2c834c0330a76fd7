"""What crosses the socket between the engine and a rank, beside steps and their results. Never off the machine."""

from dataclasses import dataclass

from twofold.runtime import RuntimeConfig


@dataclass(frozen=True, slots=True)
class RankStart:
    """The first message to a rank."""

    rank: int
    runtime: RuntimeConfig


@dataclass(frozen=True, slots=True)
class Failure:
    """A rank's last message when it raised."""

    message: str
    is_model_error: bool


@dataclass(frozen=True, slots=True)
class Profile:
    """Asks a rank to start noting its kernels, or to stop and answer with a `Breakdown`.

    The answer comes before that of a step in flight.
    """

    start: bool
