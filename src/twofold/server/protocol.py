"""The bodies of requests: OpenAI's fields and vLLM's extra sampling parameters. Unknown fields are refused by name.

A field of OpenAI's that Twofold does not support is refused with the reason, unless its value changes nothing.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, Strict, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from twofold.chat.conversation import Conversation
from twofold.chat.messages import check_continues, checked_text, text_of
from twofold.chat.tools import Tools
from twofold.errors import RequestError
from twofold.sampling_params import SamplingParams, StructuredOutputsParams
from twofold.server import errors

TEXT_ONLY = "answers are text only"
OLD = "it is the older form of tools; send these"
UNSUPPORTED: dict[str, tuple[str, tuple[Any, ...]]] = {  # field -> reason, values that change nothing
    "functions": (OLD, ([],)),
    "function_call": (OLD, ("none",)),
    "guided_decoding_backend": ("there is one library for grammars", ("auto",)),
    "best_of": ("use n, and choose among the answers", (1,)),
    "suffix": ("text is only continued, not filled in", ("",)),
    "use_beam_search": ("there is no beam search", (False,)),
    "modalities": (TEXT_ONLY, (["text"],)),
    "audio": (TEXT_ONLY, ()),
    "prediction": ("predicted output is not used", ()),
    "verbosity": ("the verbosity of a model cannot be chosen", ("medium",)),
    "service_tier": ("there is one tier", ("auto", "default")),
    "store": ("nothing is stored", (False,)),
    "web_search_options": ("the server does not search the web", ()),
    "refusal": ("the model does not refuse in a field of its own", ()),
    "annotations": (TEXT_ONLY, ([],)),
    "chat_template": ("the model's own template is used", ()),
    "prompt_embeds": ("a prompt is text or token ids", ()),
    "documents": ("documents go into messages", ([],)),
    "priority": ("requests are served in the order in which they come", (0,)),
    "length_penalty": ("there is no beam search", (1, 1.0)),
    "add_special_tokens": ("the chat template has them", (False,)),
    "return_token_ids": ("answers are text; see /tokenize", (False,)),
    "return_tokens_as_token_ids": ("answers are text; see /tokenize", (False,)),
    "previous_response_id": ("nothing is stored; send the earlier items in input", ()),
    "conversation": ("nothing is stored; send the earlier items in input", ()),
    "background": ("nothing is stored, so an answer is for the request that waits for it", (False,)),
    "truncation": ("a prompt is served as it is, or refused", ("disabled",)),
    "prompt": ("there are no stored prompts; send messages, or input", ()),
    "max_tool_calls": ("tools are called by the client, which can count", ()),
    "container": ("tools are called by the client", ()),
    "mcp_servers": ("tools are called by the client", ([],)),
    "context_management": ("a prompt is served as it is, or refused", ({}, {"edits": []})),
}
# Hints about caches, abuse and accounts: whatever they say, answers are the same.
HINTS = {
    "user", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "metadata", "include_obfuscation",
    "provider_specific_fields", "client_metadata", "cache_control", "inference_geo",
}  # fmt: skip

# The one thread of the engine searches for every stop string with every token of every answer.
MAX_STOPS, MAX_STOP_CHARS = 128, 4096
MAX_BIASES = 1024  # a rank takes them one by one
MAX_ALLOWED = 1 << 18  # no vocabulary is larger
MAX_MESSAGES, MAX_PROMPTS, MAX_STOP_TOKEN_IDS, MAX_TOKEN_IDS = 4096, 16_384, 4096, 20_000_000
MAX_TOOLS = 512

Integer = Annotated[int, Strict()]
Number = Annotated[float, Strict()]
Flag = Annotated[bool, Strict()]
String = Annotated[str, Strict()]
Item = TypeVar("Item")
List = Annotated[list[Item], Field(fail_fast=True)]  # pydantic would tell all errors of all items


def _wrong(field: str, message: str, kind: Literal["wrong", "unknown"] = "wrong") -> PydanticCustomError:
    """An error of a validator that is not about the one field that it validates."""
    return PydanticCustomError(kind, "{message}", {"message": message, "field": field})


class Body(BaseModel):
    """A body, or a part of it. Unknown fields are refused."""

    max_values: ClassVar[int] = 300_000  # in all its lists and objects

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept, known = {}, {field.alias or name for name, field in cls.model_fields.items()}
        for name, value in values.items():
            if name in known:
                kept[name] = value
            elif value is None or name in HINTS:
                continue
            elif name in UNSUPPORTED:
                reason, neutral = UNSUPPORTED[name]
                if not any(value == other and type(value) is type(other) for other in neutral):
                    raise _wrong(name, f"{name} is not supported: {reason}")
            else:
                raise _wrong(shown := errors.shown(name), f"unknown field {shown!r}", "unknown")
        return kept


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) == {int}


def _as_array(ids: list[int]) -> NDArray[np.int32]:
    """Token ids as the engine has them, [T]: a million takes 4 MB, and nobody waits until they are passed on."""
    try:
        return np.asarray(array("i", ids))
    except OverflowError:
        raise ValueError("a token id is out of range; no model has more than 2147483647") from None


def _check_ids(value: Any) -> Any:
    if value == []:
        return np.zeros(0, np.int32)
    if not _is_ids(value):
        raise ValueError("it must be a list of token ids")
    return _as_array(value)


def _check_prompt(value: Any) -> Any:
    if isinstance(value, str):
        return checked_text(value)
    if _is_ids(value):
        return _as_array(value)
    if isinstance(value, list) and len(value) > MAX_PROMPTS:
        raise ValueError(f"it must have at most {MAX_PROMPTS} prompts, got {len(value)}; send fewer at once")
    if isinstance(value, list) and value and all(isinstance(prompt, str) for prompt in value):
        return [checked_text(prompt) for prompt in value]
    if isinstance(value, list) and value and all(map(_is_ids, value)):
        return [_as_array(ids) for ids in value]
    raise ValueError("it must be a string, a list of token ids, or a list of one of these, and not empty")


_TEXT_SCHEMA = {"type": "string", "minLength": 1}
_IDS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
Prompts = Annotated[
    Any,
    PlainValidator(_check_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT_SCHEMA,
                _IDS_SCHEMA,
                {"type": "array", "items": _TEXT_SCHEMA, "minItems": 1},
                {"type": "array", "items": _IDS_SCHEMA, "minItems": 1},
            ]
        }
    ),
]


_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
Content = Annotated[
    str,
    PlainValidator(text_of),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA, "minItems": 1}]}),
]


def check_stops(field: str, stops: Sequence[str]) -> None:
    """Raises an error for more stop strings than the engine searches for."""
    num_chars = sum(map(len, stops))
    if len(stops) > MAX_STOPS or num_chars > MAX_STOP_CHARS:
        limit = f"at most {MAX_STOPS} strings of {MAX_STOP_CHARS} characters in all"
        raise _wrong(field, f"{field} must be {limit}, got {len(stops)} of {num_chars}")


class FunctionCall(Body):
    name: String
    arguments: String = "{}"


class ToolCall(Body):
    id: String | None = None
    index: Integer | None = None  # a delta has it, and clients may send what they got
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: String | None = None
    tool_calls: List[ToolCall] | None = Field(None, max_length=MAX_MESSAGES)
    tool_call_id: String | None = None
    reasoning_content: String | None = None
    reasoning: String | None = None

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.reasoning_text)):
            raise _wrong("content", "content is required")
        return self

    @property
    def reasoning_text(self) -> str | None:
        return self.reasoning_content or self.reasoning

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


ToolName = Annotated[String, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$", examples=["get_weather"])]


class Function(Body):
    name: ToolName
    description: String | None = None
    parameters: dict[str, Any] | None = None
    strict: Flag | None = None  # arguments of tools that must be called always follow their schema


class Tool(Body):
    type: Literal["function"]
    function: Function


def _check_choice(value: Any) -> Any:
    if value in ("none", "auto", "required") and isinstance(value, str):
        return value
    match value:
        case {"type": "function", "function": {"name": str(), **more}, **others} if not more and not others:
            return value
    raise ValueError("it must be 'none', 'auto', 'required' or {'type': 'function', 'function': {'name': ...}}")


_NAME_SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": ["none", "auto", "required"]},
        {
            "type": "object",
            "properties": {"type": {"const": "function"}, "function": _NAME_SCHEMA},
            "required": ["type", "function"],
        },
    ]
}
Choice = Annotated[Any, PlainValidator(_check_choice), WithJsonSchema(_CHOICE_SCHEMA)]


class Chat(Body):
    """Fields of what a chat template makes a prompt of."""

    messages: List[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    tools: List[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Choice | None = None
    parallel_tool_calls: Flag | None = None
    add_generation_prompt: Flag | None = None
    continue_final_message: Flag | None = None
    reasoning_effort: String | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def conversation(self) -> Conversation:
        """Raises RequestError if fields contradict each other."""
        continues = bool(self.continue_final_message)
        begins = not continues if self.add_generation_prompt is None else self.add_generation_prompt
        messages = [message.as_dict() for message in self.messages]
        check_continues(messages, begins, continues)
        return Conversation(
            messages,
            self._tools(),
            add_generation_prompt=begins,
            continue_final_message=continues,
            effort=self.reasoning_effort,
            variables=self.chat_template_kwargs or {},
        )

    def _tools(self) -> Tools:
        given = [tool.model_dump(exclude_none=True) for tool in self.tools or ()]
        choice: Any = self.tool_choice or "auto"
        named = isinstance(choice, dict)
        name = choice["function"]["name"] if named else choice
        return Tools(given, name, is_named=named, at_most_one=self.parallel_tool_calls is False)


class StreamOptions(Body):
    include_usage: Flag = False
    continuous_usage_stats: Flag = False  # with every chunk


def _check_form(value: Any) -> StructuredOutputsParams:
    """vLLM's `structured_outputs`."""
    known = [field.name for field in fields(StructuredOutputsParams) if field.name != "reasoning"]
    if not isinstance(value, dict) or not value.keys() <= set(known):
        raise ValueError(f"it must be an object with one or more of {', '.join(known)}")
    return StructuredOutputsParams(**value)


def _check_response_format(value: Any) -> StructuredOutputsParams | None:
    """OpenAI's `response_format`; None for text in any form."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True)
    if kind != "json_schema":
        raise ValueError("it must be an object with the type 'text', 'json_object' or 'json_schema'")
    given = value.get("json_schema")
    schema = given.get("schema") if isinstance(given, dict) else None
    if not isinstance(schema, dict):
        raise ValueError("json_schema must be an object that has a schema, which is an object")
    return StructuredOutputsParams(json=schema)


def _check_logit_bias(value: Any) -> dict[int, float]:
    """Token id, as text, -> bias."""
    if not isinstance(value, dict):
        raise ValueError("it must be an object with token ids as keys, and numbers as values")
    if len(value) > MAX_BIASES:
        raise ValueError(f"it must have at most {MAX_BIASES} token ids, got {len(value)}")
    biases = {}
    for token_id, bias in value.items():
        if not (isinstance(token_id, str) and token_id.isascii() and token_id.isdigit() and len(token_id) <= 10):
            raise ValueError(f"{errors.shown(str(token_id))!r} is not a token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of {token_id} must be a number from -100 to 100")
        biases[int(token_id)] = float(bias)
    return biases


_SCHEMA_SCHEMA = {"type": "object", "examples": [{"type": "object"}]}
Form = Annotated[
    StructuredOutputsParams,
    PlainValidator(_check_form),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "object", "properties": {name: schema}, "required": [name], "additionalProperties": False}
                for name, schema in {
                    "json": _SCHEMA_SCHEMA,
                    "regex": {"type": "string", "minLength": 1},
                    "choice": {"type": "array", "items": {"type": "string"}, "minItems": 1},
                    "grammar": {"type": "string", "minLength": 1},
                    "json_object": {"const": True},
                }.items()
            ]
        }
    ),
]
ResponseFormat = Annotated[
    StructuredOutputsParams | None,
    PlainValidator(_check_response_format),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "object", "properties": {"type": {"enum": ["text", "json_object"]}}, "required": ["type"]},
                {
                    "type": "object",
                    "properties": {
                        "type": {"const": "json_schema"},
                        "json_schema": {
                            "type": "object",
                            "properties": {"name": {"type": "string"}, "schema": _SCHEMA_SCHEMA},
                            "required": ["schema"],
                        },
                    },
                    "required": ["type", "json_schema"],
                },
            ]
        }
    ),
]
LogitBias = Annotated[
    dict[int, float],
    PlainValidator(_check_logit_bias),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}}),
]


def make_params(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> SamplingParams:
    """`defaults` are the model's, for fields that were left out. Their max_tokens bounds what may be asked for."""
    values = {**defaults, **given}
    if (limit := defaults.get("max_tokens")) is not None:
        values["max_tokens"] = min(limit, values["max_tokens"] or limit)
    return SamplingParams(**values)


class Sampling(Body):
    """Fields that completions and chats have in common."""

    model: String | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    n: Integer | None = Field(None, ge=1, le=128)
    temperature: Number | None = Field(None, ge=0, le=1e6)
    top_p: Number | None = Field(None, gt=0, le=1)
    top_k: Integer | None = Field(None, ge=-1, lt=2**31)
    min_p: Number | None = Field(None, ge=0, le=1)
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    repetition_penalty: Number | None = Field(None, ge=1e-6, le=1e6)
    seed: Integer | None = Field(None, ge=-(2**63), lt=2**64)
    stop: String | List[String] | None = None
    stop_token_ids: List[Integer] | None = Field(None, max_length=MAX_STOP_TOKEN_IDS)
    ignore_eos: Flag | None = None
    min_tokens: Integer | None = Field(None, ge=0, lt=2**31)
    skip_special_tokens: Flag | None = None
    spaces_between_special_tokens: Flag | None = None
    include_stop_str_in_output: Flag | None = None
    logit_bias: LogitBias | None = None
    bad_words: List[String] | None = Field(None, max_length=MAX_STOPS)
    allowed_token_ids: List[Integer] | None = Field(None, min_length=1, max_length=MAX_ALLOWED)
    response_format: ResponseFormat | None = None
    structured_outputs: Form | None = None
    guided_json: String | dict[str, Any] | None = None
    guided_regex: String | None = None
    guided_choice: List[String] | None = None
    guided_grammar: String | None = None

    _passed_on: ClassVar[tuple[str, ...]] = (
        "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
        "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens", "skip_special_tokens",
        "spaces_between_special_tokens", "include_stop_str_in_output", "logit_bias", "bad_words", "allowed_token_ids",
    )  # fmt: skip
    _forms: ClassVar[tuple[str, ...]] = (
        "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    )  # fmt: skip

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        given = [name for name in self._forms if getattr(self, name) is not None]
        if len(given) > 1:
            raise _wrong(given[1], f"{given[1]} and {given[0]} both say what form the answer has; give one of them")
        try:
            self._form()
        except RequestError as error:
            raise _wrong(self.form_field, f"{self.form_field}: {error}") from None
        return self

    @property
    def form_field(self) -> str:
        """The field that says what form the answer has."""
        return next((name for name in self._forms if getattr(self, name) is not None), "structured_outputs")

    def _form(self) -> StructuredOutputsParams | None:
        value = getattr(self, self.form_field)
        if value is None or isinstance(value, StructuredOutputsParams):
            return value
        return StructuredOutputsParams(**{self.form_field.removeprefix("guided_"): value})

    @model_validator(mode="after")
    def _check_sampling(self) -> Self:
        check_stops("stop", self.stop if isinstance(self.stop, list) else [self.stop or ""])
        if self.stream_options is not None and not self.stream:
            raise _wrong("stream_options", "stream_options are for stream=true only")
        return self

    def _sampling_params(self, own: Mapping[str, Any], defaults: Mapping[str, Any]) -> SamplingParams:
        given = {name: value for name in self._passed_on if (value := getattr(self, name)) is not None}
        return make_params({**given, **own, "structured_outputs": self._form()}, defaults)


class CompletionRequest(Sampling):
    max_values: ClassVar[int] = MAX_TOKEN_IDS

    prompt: Prompts
    max_tokens: Integer | None = Field(None, ge=0, lt=2**31, examples=[16])  # 0 only with echo
    echo: Flag | None = None
    logprobs: Integer | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _check_max_tokens(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise _wrong("max_tokens", "max_tokens must be at least 1, or echo be true; got 0")
        return self

    @property
    def prompts(self) -> list[str | NDArray[np.int32]]:
        return self.prompt if isinstance(self.prompt, list) else [self.prompt]

    @property
    def num_asked(self) -> int | None:
        return self.max_tokens

    @property
    def only_echo(self) -> bool:
        """Whether only the prompt's text and log-probabilities are asked for."""
        return self.max_tokens == 0

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        own: dict[str, Any] = {"logprobs": self.logprobs}
        own["max_tokens"] = 16 if self.max_tokens is None else max(self.max_tokens, 1)
        if self.echo and self.logprobs is not None:
            own["prompt_logprobs"] = self.logprobs
        return self._sampling_params(own, defaults)


class ChatRequest(Chat, Sampling):
    max_tokens: Integer | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: Integer | None = Field(None, ge=1, lt=2**31)
    logprobs: Flag | None = Field(None, examples=[True])
    top_logprobs: Integer | None = Field(None, ge=0, le=20)
    include_reasoning: Flag | None = None

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise _wrong("top_logprobs", "top_logprobs is for logprobs=true only")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise _wrong("max_tokens", "max_tokens and max_completion_tokens differ; give one of them")
        return self

    @property
    def num_asked(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        return self._sampling_params(
            {
                "max_tokens": self.num_asked,
                "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
            },
            defaults,
        )


class TokenizeRequest(Chat):
    """A prompt, or messages for the chat template."""

    model: String | None = None
    prompt: String | None = None
    messages: List[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)  # type: ignore[assignment]
    add_special_tokens: Flag = True
    return_token_strs: Flag = False

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise _wrong("prompt", "give either prompt or messages")
        return self


class DetokenizeRequest(Body):
    model: String | None = None
    max_values: ClassVar[int] = MAX_TOKEN_IDS

    tokens: Annotated[
        Any,
        PlainValidator(_check_ids),
        WithJsonSchema({"type": "array", "items": {"type": "integer", "minimum": 0}}),
    ]
