"""What a user can ask of the sampling of one request, under vLLM's names and with its defaults."""

import difflib
import inspect
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from twofold.errors import RequestError

_GREEDY_BELOW = 1e-5
_MAX_INT = 2**31 - 1
_OPTIONAL = ("seed", "max_tokens", "logprobs", "prompt_logprobs")
_INTEGERS = {  # both ends included
    "n": (1, 128),
    "top_k": (-1, _MAX_INT),
    "seed": (-(2**63), 2**64 - 1),
    "max_tokens": (1, _MAX_INT),
    "min_tokens": (0, _MAX_INT),
    "logprobs": (0, 20),
    "prompt_logprobs": (0, 20),
}
_NUMBERS = {  # both ends included; the outermost ones keep float32 arithmetic finite
    "temperature": (0.0, 1e6),
    "top_p": (math.ulp(0.0), 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (1e-6, 1e6),
}
_FLAGS = (
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
)


def _wrong(name: str, rule: str, value: object) -> RequestError:
    try:
        shown = " ".join(reprlib.repr(value).split())
    except ValueError:  # Python refuses to print integers of thousands of digits
        shown = f"a very large {type(value).__name__}"
    return RequestError(f"{name} must be {rule}, got {shown}")


def _integer(name: str, value: object, low: int, high: int, optional: bool = False) -> int | None:
    if optional and value is None:
        return None
    if isinstance(value, int | np.integer) and not isinstance(value, bool) and low <= value <= high:
        return int(value)
    raise _wrong(name, f"an integer from {low} to {high}{' or None' * optional}", value)


def _number(name: str, value: object, low: float, high: float) -> float:
    real = int | float | np.integer | np.floating
    if isinstance(value, real) and not isinstance(value, bool) and low <= value <= high:  # NaN is in no range
        return float(value)
    lowest = "above 0" if low == math.ulp(0.0) else f"at least {low:g}"
    raise _wrong(name, f"a finite number {lowest} and at most {high:g}", value)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are drawn, and when to stop. Checked once, here; `RequestError` names the fault.

    A temperature below 1e-5 means greedy: the most likely token, whatever `top_k`, `top_p` and `min_p` say. A
    `top_k` of 0 or -1 is off. `max_tokens=None` generates up to the engine's `max_model_len`. Until `min_tokens`
    tokens were generated neither an end-of-sequence token nor anything in `stop` or `stop_token_ids` ends the request.
    `logprobs=0` reports the sampled token alone. `stop` takes a string or several, and both `stop` and
    `stop_token_ids` take None; afterwards they are tuples.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        """Answer what the generated `__init__` would answer with a TypeError, in the user's terms."""
        if args:
            raise RequestError(f"sampling parameters are given by name, got {reprlib.repr(args[0])} without one")
        known = [field.name for field in fields(cls)]
        for name in kwargs:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known))}"
                raise RequestError(f"{reprlib.repr(name)} is not a sampling parameter; {hint}")
        return super().__new__(cls)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The parameters in `values`, by name, and the defaults of all others."""
        return cls(**{str(name): value for name, value in values.items()})

    def __post_init__(self) -> None:
        checked: dict[str, object] = {}
        for name, (low, high) in _INTEGERS.items():
            checked[name] = _integer(name, getattr(self, name), low, high, name in _OPTIONAL)
        for name, (least, most) in _NUMBERS.items():
            checked[name] = _number(name, getattr(self, name), least, most)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, "True or False", getattr(self, name))
        checked["stop"] = self._stop_strings()
        checked["stop_token_ids"] = self._stop_ids()
        for name, value in checked.items():
            object.__setattr__(self, name, value)

        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _wrong("min_tokens", f"at most max_tokens, which is {self.max_tokens}", self.min_tokens)
        if self.greedy and self.n > 1:
            raise _wrong("n", "1 when sampling is greedy (raise temperature to get different answers)", self.n)
        if self.stop and not self.detokenize:
            raise _wrong("stop", "empty when detokenize is False (use stop_token_ids)", self.stop)

    def _stop_strings(self) -> tuple[str, ...]:
        stop: object = (self.stop,) if isinstance(self.stop, str) else () if self.stop is None else self.stop
        if not isinstance(stop, list | tuple) or not all(isinstance(text, str) for text in stop):
            raise _wrong("stop", "a string, a list of strings or None", stop)
        if not all(stop):
            raise _wrong("stop", "without empty strings", stop)
        return tuple(stop)

    def _stop_ids(self) -> tuple[int, ...]:
        ids: object = () if self.stop_token_ids is None else self.stop_token_ids
        if not isinstance(ids, list | tuple | set | frozenset):
            raise _wrong("stop_token_ids", "a list of token ids or None", ids)
        return tuple(_integer("each of stop_token_ids", i, 0, _MAX_INT) or 0 for i in ids)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < _GREEDY_BELOW


# `help` and notebooks would show the signature of `__new__`, which names no field.
_init = inspect.signature(SamplingParams.__init__)
SamplingParams.__signature__ = _init.replace(parameters=[*_init.parameters.values()][1:])  # type: ignore[attr-defined]
