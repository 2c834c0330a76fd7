"""Engine arguments as a script or a command line gives them: Twofold's own, and vLLM's that ask for nothing."""

import difflib
from argparse import ArgumentParser, Namespace
from typing import Any, Self, TypeVar

from twofold.config import EngineConfig
from twofold.errors import ConfigError
from twofold.flags import add_engine_arguments, chosen_engine_arguments
from twofold.vllm_arguments import FOREIGN, without_foreign

Parser = TypeVar("Parser", bound=ArgumentParser)


class EngineArgs(EngineConfig):
    """An `EngineConfig` that also takes vLLM's arguments whose value asks for nothing (`vllm_arguments.py`).

    Raises:
        ConfigError: an argument is not known or not supported, or its value is wrong.
    """

    def __init__(self, model: str | None = None, **given: Any) -> None:
        known = EngineConfig.__dataclass_fields__
        for name in given:
            if name not in known and name not in FOREIGN:
                close = difflib.get_close_matches(name, [*known, *FOREIGN], n=1)
                hint = f"did you mean {close[0]}? " if close else ""
                raise ConfigError(
                    f"unknown engine argument {name!r}; {hint}known are {', '.join(sorted(known))}", field=name
                )
        own = without_foreign(given)
        super().__init__(model=model, **own)  # type: ignore[arg-type] # None is refused there, in words

    @staticmethod
    def add_cli_args(parser: Parser) -> Parser:
        """Adds a flag for each argument to a script's own parser. A flag that is not given sets no attribute."""
        add_engine_arguments(parser, required=False)
        return parser

    @classmethod
    def from_cli_args(cls, args: Namespace) -> Self:
        """The engine arguments among those of a command line."""
        return cls(**chosen_engine_arguments(args))


AsyncEngineArgs = EngineArgs
