"""Which tokens may come next in an answer: bit masks, made here while the ranks compute.

    structured_outputs ──► a grammar, and for each answer a matcher ┐
    allowed_token_ids ───► one mask for all tokens                  ├──► the mask of the next token ──► ranks
    bad_words ───────────► token ids of each word                   ┘

A mask follows from a request's parameters and its tokens so far. So preemption and the loss of ranks change nothing
here. Grammars are llguidance's. It bounds time and memory, of compiling a grammar and of each mask.

In a mask of W words of 32 bits, token i is bit i % 32 of word i // 32. Bit 1: the token may come.
"""

import copy
import json
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from twofold.errors import RequestError
from twofold.sampling_params import Reasoning, SamplingParams, StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
    from transformers import PreTrainedTokenizerBase

MAX_CHARS = {"json": 1 << 18, "choice": 1 << 18, "regex": 1 << 15, "grammar": 1 << 15}
MAX_KEYS = 3000  # in all objects of a schema: its time grows with their square, and takes 0.6 s for so many
MAX_LEXER_STATES = 50_000  # of a grammar, 1 to 2 kB each
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"  # without a bound, a model that has nothing to say never ends its spaces
NUM_THREADS = 1  # more of them, woken for each step, take longer: 32 masks 1.6 ms with eight, 0.4 ms with one
MAX_KEPT = 64  # compiled restrictions
SEARCH_SECONDS = 0.2  # for the place in a schema that cannot be compiled

_OF_SCHEMAS = {"properties", "patternProperties", "$defs", "definitions"}  # name -> schema
_NO_TOKEN = "no token may come next: the form, allowed_token_ids, bad_words and min_tokens together exclude all"


@dataclass(frozen=True, slots=True)
class Restriction:
    """What parameters say of the tokens of every answer to them. W words in a mask."""

    matcher: "LLMatcher | None"  # at the start of an answer
    always: NDArray[np.int32]  # [W] without what may never come
    in_reasoning: NDArray[np.int32]  # [W] all but the end of the answer, which has no form yet
    bad_sequences: tuple[tuple[int, ...], ...]  # of two tokens or more


class NextTokens:
    """What may come next in one answer. A grammar rests during the reasoning before the form."""

    def __init__(self, restriction: Restriction, reasoning: Reasoning | None = None) -> None:
        self._restriction = restriction
        self._matcher = None if restriction.matcher is None else restriction.matcher.deep_copy()
        self._reasoning = reasoning
        self._reasons = reasoning is not None and reasoning.begin is None
        self._tokens: list[int] = []
        self._mask = restriction.always  # the last one made

    @property
    def matcher(self) -> "LLMatcher | None":
        return None if self._reasons else self._matcher

    def restrict(self, mask: NDArray[np.int32]) -> None:
        """Completes `mask` [W], which has what the grammar allows, and keeps it: `take` looks at it."""
        if self._matcher is not None and self._matcher.is_error():
            mask[:] = 0
        if self._reasons:
            mask &= self._restriction.in_reasoning
        elif self._reasoning is not None and self._reasoning.begin is not None and not self._tokens:
            mask |= _mask_of([self._reasoning.begin], len(mask))
        mask &= self._restriction.always
        for *start, last in self._restriction.bad_sequences:
            if self._tokens[-len(start) :] == start:
                mask &= ~_mask_of([last], len(mask))
        self._mask = mask

    def take(self, token: int) -> bool:
        """Whether the next token is one of those that may come. If it is, it counts as come."""
        if token >> 5 >= len(self._mask) or not int(self._mask[token >> 5]) >> (token & 31) & 1:
            return False
        self._tokens.append(token)
        if self._reasoning is not None:
            if self._reasons:
                end = self._reasoning.end
                self._reasons = tuple(self._tokens[-len(end) :]) != end
                return True
            if len(self._tokens) == 1 and token == self._reasoning.begin:
                self._reasons = True
                return True
        return self._matcher is None or self._matcher.consume_token(token)

    @property
    def is_complete(self) -> bool:
        """Whether the grammar has ended: only an end-of-sequence token may come."""
        return self.matcher is not None and self.matcher.is_stopped() and not self.matcher.is_error()

    @property
    def may_end(self) -> bool:
        """Whether the answer has its form, though it may go on."""
        return self.matcher is not None and self.matcher.is_accepting()

    @property
    def fault(self) -> str:
        """Why no token may come."""
        if self._matcher is not None and self._matcher.is_error():
            return f"the form of the answer takes too long to follow: {_in_one_line(self._matcher.get_error())}"
        return _NO_TOKEN


class MaskMaker:
    """Compiles what parameters say of tokens, and makes the masks of a step. Threads may share it.

    `tokenizer` is None where prompts are token ids only: then there are no grammars and no bad words.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase | None", vocab_size: int, eos_token_ids: frozenset[int]
    ) -> None:
        self._given_tokenizer, self._vocab_size, self._eos_token_ids = tokenizer, vocab_size, eos_token_ids
        self._num_tokens = max(vocab_size, 0 if tokenizer is None else len(tokenizer))
        self.num_words = -(-self._num_tokens // 32)
        self._lock = threading.Lock()  # held while the tokenizer and what follows are made or used
        self._tokenizer: PreTrainedTokenizerBase | None = None  # a copy, since others use theirs at the same time
        self._ll_tokenizer: LLTokenizer | None = None
        self._executor: LLExecutor | None = None
        self._kept: dict[object, Restriction] = {}  # the last ones, by what they were made of

    def compile(self, params: SamplingParams) -> Restriction | None:
        """What the parameters say of tokens; None if nothing.

        Raises:
            RequestError: the form cannot be compiled, or the model has not these tokens.
        """
        for name, ids in (("allowed_token_ids", params.allowed_token_ids), ("logit_bias", params.logit_bias)):
            if (outside := max(ids or (0,))) >= self._vocab_size:
                raise RequestError(
                    f"{name} has token id {outside}; the model has ids 0 to {self._vocab_size - 1}", field=name
                )
        if not params.is_masked:
            return None
        form, bad_words = params.structured_outputs, tuple(params.bad_words or ())
        # Schemas are text, so they can be compared. What was asked before is most likely asked again.
        key = (form and _key(form), params.allowed_token_ids, bad_words, form is not None and params.ignore_eos)
        if (kept := self._kept.get(key)) is not None:
            return kept
        always = np.full(self.num_words, -1, np.int32)
        if params.allowed_token_ids is not None:
            always = _mask_of(params.allowed_token_ids, self.num_words)
        sequences = self._bad_sequences(bad_words)
        always &= ~_mask_of([ids[0] for ids in sequences if len(ids) == 1], self.num_words)
        matcher = None
        if form is not None:
            matcher = self._compile_form(form)
            if params.ignore_eos:
                always &= ~_mask_of(self._eos_token_ids, self.num_words)
        in_reasoning = ~_mask_of(self._eos_token_ids, self.num_words)
        restriction = Restriction(matcher, always, in_reasoning, tuple(ids for ids in sequences if len(ids) > 1))
        with self._lock:
            while len(self._kept) >= MAX_KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = restriction
        return restriction

    def make(self, answers: Sequence[NextTokens | None]) -> NDArray[np.int32]:
        """The masks [M, W] of the next tokens of M answers. An answer of None may have any token: nobody wants it."""
        masks = np.full((len(answers), self.num_words), -1, np.int32)
        matchers = [(one.matcher, i) for i, one in enumerate(answers) if one is not None and one.matcher is not None]
        if matchers:
            self._executor = self._executor or _make_executor()
            self._executor.unsafe_compute_mask_ptr(matchers, masks.ctypes.data, masks.strides[0], len(masks))
        for one, mask in zip(answers, masks, strict=True):
            if one is not None:
                one.restrict(mask)
        return masks

    def _bad_sequences(self, words: Sequence[str]) -> list[tuple[int, ...]]:
        """The tokens of each word, at the start of a text and after a space."""
        sequences: dict[tuple[int, ...], None] = {}
        for word in words:
            if self._given_tokenizer is None:
                raise RequestError(
                    "bad_words need a tokenizer, and skip_tokenizer_init is set; use logit_bias", field="bad_words"
                )
            with self._lock:
                first, inner = (tuple(self._encode(space + word.lstrip())) for space in ("", " "))
            sequences[first] = None
            # Otherwise the space is a token by itself, before the tokens of the word.
            if len(inner) == len(first) and inner[:1] != first[:1]:
                sequences[inner] = None
        return [ids for ids in sequences if ids]

    def _encode(self, text: str) -> list[int]:
        self._tokenizer = self._tokenizer or copy.deepcopy(self._given_tokenizer)
        assert self._tokenizer is not None
        token_ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return token_ids

    def _compile_form(self, form: StructuredOutputsParams) -> "LLMatcher":
        from llguidance import LLMatcher

        grammar = _grammar(form)
        matcher = LLMatcher(self._tokenizer_of_grammars(), grammar, log_level=0, limits=_limits())
        if matcher.is_error():
            raise _cannot_compile(form, matcher.get_error())
        return matcher

    def _tokenizer_of_grammars(self) -> "LLTokenizer":
        from llguidance import LLTokenizer

        with self._lock:
            if self._ll_tokenizer is None:
                backend = getattr(self._given_tokenizer, "backend_tokenizer", None)
                if backend is None:
                    has = "skip_tokenizer_init is set" if self._given_tokenizer is None else "the model's has no such"
                    raise _wrong_form(f"structured outputs need a tokenizer of the tokenizers library, and {has}")
                described = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
                eos = sorted(self._eos_token_ids) or getattr(self._given_tokenizer, "eos_token_id", None)
                try:
                    self._ll_tokenizer = LLTokenizer(json.dumps(described), n_vocab=self._num_tokens, eos_token=eos)
                except ValueError as error:
                    raise _wrong_form(f"structured outputs cannot use the model's tokenizer: {error}") from None
            return self._ll_tokenizer


def _make_executor() -> "LLExecutor":
    from llguidance import LLExecutor

    return LLExecutor(NUM_THREADS)


def _limits() -> "LLParserLimits":
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)


def _mask_of(token_ids: Any, num_words: int) -> NDArray[np.int32]:
    """The mask [W] of these tokens."""
    bits = np.zeros(32 * num_words, np.uint8)
    bits[[i for i in token_ids if i < len(bits)]] = 1
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)


def _key(form: StructuredOutputsParams) -> tuple[object, ...]:
    return (
        form.json, form.regex, form.choice, form.grammar, form.json_object, form.disable_any_whitespace,
        form.disable_additional_properties, form.whitespace_pattern,
    )  # fmt: skip


def _grammar(form: StructuredOutputsParams) -> str:
    """As llguidance takes it."""
    from llguidance import LLMatcher, grammar_from

    name = _name(form)
    text = form.json or form.regex or form.grammar or json.dumps(form.choice)
    assert isinstance(text, str)
    if len(text) > (limit := MAX_CHARS.get(name, len(text))):
        raise _wrong_form(f"{name} has {len(text)} characters, more than {limit}; send less")
    if name == "regex":
        return LLMatcher.grammar_from_regex(text)
    if name in ("grammar", "choice"):
        try:
            return grammar_from(name, text)  # type: ignore[arg-type]
        except ValueError as error:
            raise _cannot_compile(form, str(error)) from None
    schema = {"type": "object"} if form.json_object else _parse(text)
    if (num_keys := _num_keys(schema)) > MAX_KEYS:
        raise _wrong_form(f"{name} has {num_keys} keys in its objects, more than {MAX_KEYS}; send a smaller schema")
    if form.disable_additional_properties:
        schema = _closed(schema)
    whitespace = WHITESPACE if form.whitespace_pattern is None else form.whitespace_pattern
    return _json_grammar(schema, None if form.disable_any_whitespace else whitespace)


def _json_grammar(schema: Any, whitespace: str | None = WHITESPACE) -> str:
    from llguidance import LLMatcher

    options: dict[str, Any] = {"whitespace_flexible": whitespace is not None}
    if whitespace is not None:
        options["whitespace_pattern"] = whitespace
    # Options in a schema would make llguidance ignore what it cannot check.
    overrides = {"lenient": False, "coerce_one_of": False}
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), options, overrides)  # type: ignore[arg-type]


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _wrong_form(f"json is not JSON: {error.msg} at character {error.pos}") from None
    except (ValueError, RecursionError):
        raise _wrong_form("json cannot be read: it is too deep, or has numbers of thousands of digits") from None


def _num_keys(schema: Any) -> int:
    if isinstance(schema, dict):
        return len(schema) + sum(map(_num_keys, schema.values()))
    return sum(map(_num_keys, schema)) if isinstance(schema, list) else 0


def _closed(schema: Any) -> Any:
    """A schema whose objects have no properties but those that it names."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(value) for name, value in schema.items()}
    if not isinstance(schema.get("properties"), dict):
        return closed
    return {"additionalProperties": False} | closed


def _name(form: StructuredOutputsParams) -> str:
    return next(name for name in ("json", "regex", "choice", "grammar", "json_object") if getattr(form, name))


def _cannot_compile(form: StructuredOutputsParams, message: str) -> RequestError:
    name, where = _name(form), ""
    if name == "json":
        assert isinstance(form.json, str)
        where = "".join(f"/{part}" for part in _place(_parse(form.json), message))
    return _wrong_form(f"{name} cannot be compiled{f' at {where}' * bool(where)}: {_in_one_line(message)}")


def _place(schema: Any, message: str) -> list[str]:
    """The way to the innermost part of a schema that by itself cannot be compiled, with the same message."""
    from llguidance import LLMatcher

    names = {"$defs", "definitions"}
    definitions = {name: schema[name] for name in names if isinstance(schema, dict) and name in schema}
    way: list[str] = []
    deadline = time.monotonic() + SEARCH_SECONDS
    while True:
        for place, part in _parts(schema):
            if time.monotonic() > deadline:
                return way
            if LLMatcher.validate_grammar(_json_grammar({**definitions, **part}), None, limits=_limits()) == message:
                way, schema = way + place, part
                break
        else:
            return way


def _parts(schema: Any) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """The schemas directly within a schema, with the keys and indices that lead there."""
    for name, value in schema.items() if isinstance(schema, dict) else ():
        several = dict(enumerate(value)) if isinstance(value, list) else value if name in _OF_SCHEMAS else {name: value}
        for key, part in several.items() if isinstance(several, dict) else ():
            if isinstance(part, dict):
                yield [name] if part is value else [name, str(key)], part


def _in_one_line(message: str) -> str:
    """The first line, and what a later one says of the error."""
    if message.startswith("panic:"):  # an assertion of llguidance's, which it survives
        return "it is too large"
    lines = [line.strip() for line in message.splitlines() if re.search(r"\w", line)]
    causes = [line for line in lines[1:] if line.startswith("error: ")]
    return " ".join(lines[:1] + causes)


def _wrong_form(message: str) -> RequestError:
    return RequestError(message, field="structured_outputs")
