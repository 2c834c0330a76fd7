"""Sampling parameters of a request, with vLLM's names and defaults."""

import difflib
import inspect
import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any, Self

import numpy as np

from twofold.errors import RequestError

_GREEDY_BELOW = 1e-5
_MAX_INT = 2**31 - 1
_MAX_BIAS = 1e6
_OPTIONAL = ("seed", "max_tokens", "logprobs", "prompt_logprobs", "truncate_prompt_tokens")
_INTEGERS = {  # lowest and highest value
    "n": (1, 128),
    "top_k": (-1, _MAX_INT),
    "seed": (-(2**63), 2**64 - 1),
    "max_tokens": (1, _MAX_INT),
    "min_tokens": (0, _MAX_INT),
    "logprobs": (-1, _MAX_INT),  # the engine has a limit of its own: max_logprobs
    "prompt_logprobs": (-1, _MAX_INT),
    "truncate_prompt_tokens": (-1, _MAX_INT),
}
_NUMBERS = {  # lowest and highest value; 1e6 keeps float32 arithmetic finite
    "temperature": (0.0, 1e6),
    "top_p": (math.ulp(0.0), 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (1e-6, 1e6),
}
_FORMS = ("json", "regex", "choice", "grammar", "json_object")
# vLLM's, old ones among them: what is to be done instead, and values that ask for nothing, besides None.
_FOREIGN: dict[str, tuple[str, tuple[Any, ...]]] = {
    "best_of": ("give n, and choose among the answers", ()),  # and the value of n
    "use_beam_search": ("use LLM.beam_search", (False,)),
    "early_stopping": ("use LLM.beam_search", (False,)),
    "guided_decoding": ("use structured_outputs", ()),
    "flat_logprobs": ("log-probabilities are a list of dicts", (False,)),
    "logprob_token_ids": ("use logprobs=-1, and take those of the tokens", ()),
    "prompt_logprob_token_ids": ("use prompt_logprobs=-1, and take those of the tokens", ()),
    "prompt_logprob_start": ("use prompt_logprobs, and leave out the first ones", (0,)),
    "repetition_detection": ("use frequency_penalty or repetition_penalty", ()),
    "thinking_token_budget": ("use max_tokens", ()),
    "skip_reading_prefix_cache": ("use LLM.reset_prefix_cache", (False,)),
    "stream_interval": ("outputs come with every token, and those not taken in time are joined", (1,)),
    "skip_clone": ("parameters are copied when a request uses them", (False,)),
    "watermarking": ("answers have no watermark", (False,)),
    "extra_args": ("there are no plugins", ({},)),
    "routed_experts_prompt_start": ("the choice of experts is not told", (0,)),
    "trace_decode_token_ids": ("put the tokens into the prompt, and use prompt_logprobs", ()),
}
_FLAGS = (
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
)


def _wrong(name: str, rule: str, value: object, *, one_of_many: bool = False) -> RequestError:
    try:
        shown = " ".join(reprlib.repr(value).split())
    except ValueError:  # Python refuses to print integers of thousands of digits
        shown = f"a very large {type(value).__name__}"
    return RequestError(f"{'each of ' * one_of_many}{name} must be {rule}, got {shown}", field=name)


def _is_integer(value: object, low: int, high: int) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and low <= int(value) <= high


def _integer(name: str, value: Any, low: int, high: int, optional: bool = False) -> int | None:
    if optional and value is None:
        return None
    if _is_integer(value, low, high):
        return int(value)
    raise _wrong(name, f"an integer from {low} to {high}{' or None' * optional}", value)


def _number(name: str, value: object, low: float, high: float) -> float:
    real = int | float | np.integer | np.floating
    if isinstance(value, real) and not isinstance(value, bool) and low <= value <= high:  # NaN is in no range
        return float(value)
    lowest = "above 0" if low == math.ulp(0.0) else f"at least {low:g}"
    raise _wrong(name, f"a finite number {lowest} and at most {high:g}", value)


class RequestOutputKind(Enum):
    """Which outputs a request gives while it runs."""

    CUMULATIVE = auto()  # after each of its steps, all tokens so far
    DELTA = auto()  # after each of its steps, what is new since the last output
    FINAL_ONLY = auto()  # one, when it ends


def _token_ids(name: str, given: object) -> tuple[int, ...]:
    ids: object = () if given is None else given
    if not isinstance(ids, list | tuple | set | frozenset):
        raise _wrong(name, "a list of token ids or None", ids)
    if ids and set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) <= _MAX_INT:  # there may be 100,000
        return tuple(ids)
    for one in ids:
        if not _is_integer(one, 0, _MAX_INT):
            raise _wrong(name, f"an integer from 0 to {_MAX_INT}", one, one_of_many=True)
    return tuple(map(int, ids))


@dataclass(frozen=True)
class Reasoning:
    """What may stand before the form of an answer.

    end: the token ids that end it; the form begins after them.
    begin: the token that begins it, if it is the answer's first. None: the answer begins within the reasoning.
    """

    end: tuple[int, ...]
    begin: int | None = None


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """What form an answer has: one of the first five.

    json: a JSON schema, as a dict or as text.
    regex: a regular expression that the whole answer matches, in Rust's syntax.
    choice: the texts that an answer may be.
    grammar: a context-free grammar, Lark or EBNF (`root ::= ...`).
    json_object: True for any JSON object.
    disable_any_whitespace: JSON is written without spaces and line breaks.
    disable_additional_properties: objects of the schema have only the properties that it names, unless it says more.
    whitespace_pattern: a regular expression of what may stand between the parts of JSON.
    disable_fallback: there is one library for grammars, and so nothing to fall back to; either value will do.
    structural_tag: not supported.
    reasoning: what may stand before the form; the server finds it by the model's chat template.

    Raises:
        RequestError: a value has a wrong type, or there is not exactly one form.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_fallback: bool = False
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    structural_tag: str | None = None
    reasoning: Reasoning | None = None

    def __post_init__(self) -> None:
        if self.structural_tag is not None:
            raise RequestError(
                "structural_tag is not supported; give json, or a grammar for the text around it",
                field="structured_outputs",
            )
        given = [name for name in _FORMS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise _wrong("structured_outputs", f"one of {', '.join(_FORMS)}", given or None)
        for name in ("regex", "grammar", "whitespace_pattern"):
            if not isinstance(value := getattr(self, name), str | None) or value == "":
                raise _wrong(name, "text that is not empty", value)
        for name in ("json_object", "disable_fallback", "disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(value := getattr(self, name), bool | None):
                raise _wrong(name, "True or False", value)
        if self.choice is not None:
            texts = isinstance(self.choice, list | tuple) and all(isinstance(text, str) for text in self.choice)
            if not texts or not self.choice:
                raise _wrong("choice", "a list of texts, at least one", self.choice)
            object.__setattr__(self, "choice", tuple(self.choice))
        if self.json is not None:
            object.__setattr__(self, "json", _json_text(self.json))


def _json_text(schema: object) -> str:
    if isinstance(schema, str) and schema:
        return schema
    if not isinstance(schema, Mapping):
        raise _wrong("json", "a JSON schema: a dict, or text that is not empty", schema)
    try:
        return json.dumps(dict(schema))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"json must be a JSON schema: {error}", field="json") from None


@dataclass
class SamplingParams:
    """How the tokens of a request are sampled, and when it ends.

    vLLM's other parameters are taken where their value asks for nothing.
    Values may be changed later. They are checked when the object is made, and when a request uses a copy of it.

    temperature: below 1e-5 sampling is greedy, and `top_k`, `top_p` and `min_p` have no effect.
    top_k: 0 and -1 are off.
    max_tokens: None generates up to the engine's `max_model_len`.
    min_tokens: before so many tokens, no end-of-sequence token, `stop` or `stop_token_ids` ends the request.
    logprobs, prompt_logprobs: 0 reports the sampled token alone, -1 all of the vocabulary.
    stop, stop_token_ids: None, or one or several; kept as tuples.
    truncate_prompt_tokens: keep so many of the prompt's last tokens; -1 keeps as many as the model takes.
    output_kind: which outputs `LLMEngine.step` and `AsyncLLM.generate` give. `LLM` returns final ones.
    logit_bias: token id -> what is added to its logit.
    bad_words: texts that no answer has, as far as their usual tokens go; kept as a tuple.
    allowed_token_ids: no other token is sampled; kept as a tuple. None allows all.
    logits_processors: refused if there are any. They are functions of this process, and ranks are other processes.
    structured_outputs: the form that the answer has.

    Raises:
        RequestError: a value has a wrong type or is out of range; `field` is its name.
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
    truncate_prompt_tokens: int | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: Mapping[int, float] | None = None
    bad_words: Sequence[str] | None = None
    allowed_token_ids: Sequence[int] | None = None
    logits_processors: Sequence[Any] | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        """Refuses, with a RequestError, what the generated `__init__` would refuse with a TypeError."""
        for name in kwargs:
            _check_name(name)
        return super().__new__(cls)

    def __setattr__(self, name: str, value: object) -> None:
        _check_name(name)
        if name in _FOREIGN:
            _check_foreign(name, value, self.n)
        else:
            object.__setattr__(self, name, value)

    def __post_init__(self) -> None:
        checked: dict[str, object] = {}
        for name, (low, high) in _INTEGERS.items():
            checked[name] = _integer(name, getattr(self, name), low, high, name in _OPTIONAL)
        for name, (least, most) in _NUMBERS.items():
            checked[name] = _number(name, getattr(self, name), least, most)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, "True or False", getattr(self, name))
        if not isinstance(self.output_kind, RequestOutputKind):
            raise _wrong("output_kind", "a RequestOutputKind", self.output_kind)
        checked["stop"] = self._stop_strings()
        checked["stop_token_ids"] = _token_ids("stop_token_ids", self.stop_token_ids)
        checked["logit_bias"] = self._logit_bias()
        checked["bad_words"] = self._bad_words()
        if self.allowed_token_ids is not None:
            checked["allowed_token_ids"] = _token_ids("allowed_token_ids", self.allowed_token_ids)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

        if self.truncate_prompt_tokens == 0:
            raise _wrong("truncate_prompt_tokens", "at least 1, or -1", 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _wrong("min_tokens", f"at most max_tokens, which is {self.max_tokens}", self.min_tokens)
        if self.greedy and self.n > 1:
            raise _wrong("n", "1 when sampling is greedy (raise temperature to get different answers)", self.n)
        if self.stop and not self.detokenize:
            raise _wrong("stop", "empty when detokenize is False (use stop_token_ids)", self.stop)
        self._check_restrictions()

    def _stop_strings(self) -> tuple[str, ...]:
        stop: object = (self.stop,) if isinstance(self.stop, str) else () if self.stop is None else self.stop
        if not isinstance(stop, list | tuple) or not all(isinstance(text, str) for text in stop):
            raise _wrong("stop", "a string, a list of strings or None", stop)
        if not all(stop):
            raise _wrong("stop", "without empty strings", stop)
        return tuple(stop)

    def _logit_bias(self) -> dict[int, float] | None:
        if self.logit_bias is None:
            return None
        if not isinstance(self.logit_bias, Mapping):
            raise _wrong("logit_bias", "a dict of token ids and numbers, or None", self.logit_bias)
        for one in self.logit_bias:
            if not _is_integer(one, 0, _MAX_INT):
                raise _wrong("logit_bias", "a dict whose keys are token ids", one)
        return {int(one): _number("logit_bias", bias, -_MAX_BIAS, _MAX_BIAS) for one, bias in self.logit_bias.items()}

    def _bad_words(self) -> tuple[str, ...]:
        words: object = () if self.bad_words is None else self.bad_words
        if not isinstance(words, list | tuple) or not all(isinstance(word, str) and word.strip() for word in words):
            raise _wrong("bad_words", "a list of texts that are not empty, or None", words)
        return tuple(words)

    def _check_restrictions(self) -> None:
        if self.logits_processors:
            raise RequestError(
                "logits_processors are not supported: they are functions of this process, and ranks are other "
                "processes; use logit_bias, allowed_token_ids, bad_words or structured_outputs",
                field="logits_processors",
            )
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise _wrong("allowed_token_ids", "None, or have a token id that may be sampled", self.allowed_token_ids)
        form: object = self.structured_outputs
        if not isinstance(form, StructuredOutputsParams | None):
            raise _wrong("structured_outputs", "StructuredOutputsParams or None", form)

    @property
    def is_masked(self) -> bool:
        """Whether the engine says before each token which ones may be sampled."""
        return self.structured_outputs is not None or self.allowed_token_ids is not None or bool(self.bad_words)

    def clone(self) -> Self:
        """A checked copy.

        Raises:
            RequestError: a value was changed to a wrong one.
        """
        return replace(self)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always chosen."""
        return self.temperature < _GREEDY_BELOW


def _check_name(name: str) -> None:
    known = SamplingParams.__dataclass_fields__
    if name not in known and name not in _FOREIGN:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known))}"
        raise RequestError(f"{reprlib.repr(name)} is not a sampling parameter; {hint}", field=name)


def _check_foreign(name: str, value: object, n: object) -> None:
    way_out, neutral = _FOREIGN[name]
    if name == "best_of":
        neutral = (n,)
    if value is not None and not any(value == one and type(value) is type(one) for one in neutral):
        raise RequestError(f"{name}={reprlib.repr(value)} is not supported: {way_out}", field=name)


_init = SamplingParams.__init__


def _init_without_foreign(self: SamplingParams, *args: Any, **given: Any) -> None:
    n = args[0] if args else given.get("n", 1)
    for name in _FOREIGN.keys() & given.keys():
        _check_foreign(name, given.pop(name), n)
    _init(self, *args, **given)


SamplingParams.__init__ = _init_without_foreign  # type: ignore[method-assign]
# Otherwise `help` and notebooks show the signature of `__new__`, which has no fields.
_signature = inspect.signature(_init)
SamplingParams.__signature__ = _signature.replace(  # type: ignore[attr-defined]
    parameters=[*_signature.parameters.values()][1:]
)


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """How a beam search goes. A score is an answer's log-probability over (number of its tokens) ** length_penalty.

    Raises:
        RequestError: a value has a wrong type or is out of range; `field` is its name.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False  # whether an answer keeps its end-of-sequence token

    def __post_init__(self) -> None:
        _integer("beam_width", self.beam_width, 1, 1024)
        _integer("max_tokens", self.max_tokens, 1, _MAX_INT)
        _number("length_penalty", self.length_penalty, -100.0, 100.0)
        if self.temperature != 0:
            raise _wrong("temperature", "0 in a beam search, which draws nothing", self.temperature)
        for name in ("ignore_eos", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, "True or False", getattr(self, name))
