"""Anthropic's messages: their requests, as a chat has them, and their answers, whole or as events."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from twofold.chat.conversation import Conversation
from twofold.chat.messages import checked_text
from twofold.chat.pieces import Arguments, Call, Text, Thought, load
from twofold.chat.tools import Tools
from twofold.engine.async_engine import Answer
from twofold.errors import TwofoldError
from twofold.sampling_params import SamplingParams, StructuredOutputsParams
from twofold.server.answers import Part, Pieces, Writer, event
from twofold.server.errors import describe
from twofold.server.protocol import (
    MAX_MESSAGES,
    MAX_TOOLS,
    Body,
    Flag,
    Integer,
    List,
    Number,
    String,
    ToolName,
    check_stops,
    make_params,
)

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens"}


def _text(content: Any, where: str) -> str:
    """The text of a content: a string, or blocks of text."""
    if isinstance(content, str):
        return checked_text(content)
    if not isinstance(content, list):
        raise ValueError(f"{where} must be a string or a list of blocks")
    return "\n".join(_block_text(block, f"{where}[{number}]") for number, block in enumerate(content))


def _block_text(block: Any, where: str) -> str:
    kind = _kind(block, where)
    if kind != "text":
        raise ValueError(f"{where} is of type {kind[:32]!r}, which is not supported; prompts are text only")
    if not isinstance(block.get("text"), str):
        raise ValueError(f"{where}.text must be a string")
    return checked_text(block["text"])


def _kind(block: Any, where: str) -> str:
    if not isinstance(block, dict) or not isinstance(block.get("type"), str):
        raise ValueError(f"{where} must be an object with a type")
    return str(block["type"])


def _check_messages(value: Any) -> list[dict[str, Any]]:
    """→ messages in OpenAI's form."""
    if not isinstance(value, list) or not value or len(value) > MAX_MESSAGES:
        raise ValueError(f"it must be a list of 1 to {MAX_MESSAGES} messages")
    messages: list[dict[str, Any]] = []
    for number, message in enumerate(value):
        where = f"[{number}]"
        if not isinstance(message, dict) or message.get("role") not in ("user", "assistant", "system"):
            raise ValueError(f"{where} must have a role, user or assistant, and a content")
        content = message.get("content")
        if isinstance(content, str):
            messages.append({"role": message["role"], "content": checked_text(content)})
        elif not isinstance(content, list):
            raise ValueError(f"{where}.content must be a string or a list of blocks")
        elif message["role"] == "assistant":
            messages.append(_of_assistant(content, f"{where}.content"))
        else:
            messages += _of_user(message["role"], content, f"{where}.content")
    return messages


def _of_assistant(blocks: list[Any], where: str) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for number, block in enumerate(blocks):
        here = f"{where}[{number}]"
        match _kind(block, here):
            case "tool_use":
                if not isinstance(block.get("id"), str) or not isinstance(block.get("name"), str):
                    raise ValueError(f"{here} must have 'id' and 'name', which are strings, and 'input'")
                function = {"name": block["name"], "arguments": block.get("input") or {}}
                calls.append({"id": block["id"], "type": "function", "function": function})
            case "thinking":
                if not isinstance(block.get("thinking"), str):
                    raise ValueError(f"{here}.thinking must be a string")
                thoughts.append(checked_text(block["thinking"]))
            case "redacted_thinking":
                pass  # nobody but its author can read it
            case _:
                texts.append(_block_text(block, here))
    message: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    return message | ({"tool_calls": calls} if calls else {})


def _of_user(role: str, blocks: list[Any], where: str) -> Iterator[dict[str, Any]]:
    """Results of tools are messages of their own, in their order."""
    texts = []
    for number, block in enumerate(blocks):
        here = f"{where}[{number}]"
        if _kind(block, here) != "tool_result":
            texts.append(_block_text(block, here))
            continue
        if not isinstance(block.get("tool_use_id"), str):
            raise ValueError(f"{here}.tool_use_id must be a string")
        text = _text(block.get("content") or "", f"{here}.content")
        text = f"Error: {text}" if block.get("is_error") is True else text
        yield {"role": "tool", "tool_call_id": block["tool_use_id"], "content": text}
    if texts or not blocks:
        yield {"role": role, "content": "\n".join(texts)}


_BLOCK_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"enum": ["text", "tool_use", "tool_result", "thinking", "redacted_thinking"]},
        "text": {"type": "string"},
    },
    "required": ["type"],
}
_CONTENT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": _BLOCK_SCHEMA}]}
_MESSAGE_SCHEMA = {
    "type": "object",
    "properties": {"role": {"enum": ["user", "assistant"]}, "content": _CONTENT_SCHEMA},
    "required": ["role", "content"],
}
Messages = Annotated[
    Any,
    PlainValidator(_check_messages),
    WithJsonSchema({"type": "array", "items": _MESSAGE_SCHEMA, "minItems": 1}),
]
System = Annotated[str, PlainValidator(lambda value: _text(value, "it")), WithJsonSchema(_CONTENT_SCHEMA)]


class AnthropicTool(Body):
    type: Literal["custom"] | None = None
    name: ToolName
    description: String | None = None
    input_schema: dict[str, Any]
    strict: Flag | None = None
    eager_input_streaming: Flag | None = None
    defer_loading: Literal[False] | None = None
    input_examples: list[Any] | None = None


class AnthropicChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: String | None = None
    disable_parallel_tool_use: Flag | None = None


class Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Integer | None = None  # a hint
    display: String | None = None


class OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    effort: String | None = None
    format: OutputFormat | None = None


class CountRequest(Body):
    """What /v1/messages/count_tokens takes: all of which the prompt is made."""

    model: String | None = None
    messages: Messages
    system: System | None = None
    tools: List[AnthropicTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: AnthropicChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    def conversation(self) -> Conversation:
        """Raises RequestError if the choice asks for what is not there."""
        messages = ([{"role": "system", "content": self.system}] if self.system else []) + self.messages
        given = [
            {
                "type": "function",
                "function": {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema},
            }
            for tool in self.tools or ()
        ]
        choice = self.tool_choice or AnthropicChoice(type="auto")
        named = choice.type == "tool"
        name = (choice.name or "") if named else {"any": "required"}.get(choice.type, choice.type)
        tools = Tools(given, name, is_named=named, at_most_one=choice.disable_parallel_tool_use is True)
        continues = messages[-1]["role"] == "assistant"  # the API's way to begin an answer
        return Conversation(
            messages,
            tools,
            add_generation_prompt=not continues,
            continue_final_message=continues,
            effort=self.output_config.effort if self.output_config is not None else None,
            thinks=None if self.thinking is None else self.thinking.type != "disabled",
        )


class MessagesRequest(CountRequest):
    max_tokens: Integer = Field(ge=1, lt=2**31, examples=[16])
    stream: Flag | None = None
    stop_sequences: List[String] | None = None
    temperature: Number | None = Field(None, ge=0, le=1e6)
    top_p: Number | None = Field(None, gt=0, le=1)
    top_k: Integer | None = Field(None, ge=0, lt=2**31)

    @model_validator(mode="after")
    def _check_sampling(self) -> "MessagesRequest":
        check_stops("stop_sequences", self.stop_sequences or ())
        return self

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        names = ("temperature", "top_p", "top_k")
        given: dict[str, Any] = {name: value for name in names if (value := getattr(self, name)) is not None}
        form = self.output_config.format if self.output_config is not None else None
        given["structured_outputs"] = None if form is None else StructuredOutputsParams(json=form.schema_)
        return make_params(given | {"max_tokens": self.max_tokens, "stop": self.stop_sequences}, defaults)


class MessagesWriter(Writer):
    """Writes blocks: one for each stretch of thinking or text, and one for each call."""

    def __init__(self, answer: Answer, model: str, pieces: Pieces) -> None:
        super().__init__(answer, model)
        self.id = f"msg_{uuid4().hex}"
        self._pieces = pieces
        self._blocks: list[dict[str, Any]] = []
        self._inputs: dict[int, str] = {}  # index of a call's block -> its arguments so far
        self._is_open = False  # the last block
        self._stop: tuple[str | None, str | None] = (None, None)  # why it ended, and the stop sequence

    def whole(self, parts: list[Part]) -> dict[str, Any]:
        for part in parts:
            for _ in self.events(part):
                pass
        for index, text in self._inputs.items():
            value = load(text)
            self._blocks[index]["input"] = value if isinstance(value, dict) else {}
        return self._object()

    def begin(self) -> Iterator[str]:
        yield event({"type": "message_start", "message": self._object()}, "message_start")

    def events(self, part: Part) -> Iterator[str]:
        index, _, completion = part
        for piece in self._pieces.of(index, completion):
            match piece:
                case Text(text):
                    yield from self._add("text", "text_delta", "text", text)
                case Thought(text):
                    yield from self._add("thinking", "thinking_delta", "thinking", text)
                case Call(name):
                    yield from self._open(
                        {"type": "tool_use", "id": f"toolu_{uuid4().hex[:24]}", "name": name, "input": {}}
                    )
                    self._inputs[len(self._blocks) - 1] = ""
                case Arguments(text):
                    self._inputs[len(self._blocks) - 1] += text
                    yield self._delta("input_json_delta", "partial_json", text)
        if completion.finish_reason is not None:
            reason = STOP_REASONS.get(completion.finish_reason)
            if reason == "end_turn" and isinstance(completion.stop_reason, str):
                self._stop = ("stop_sequence", completion.stop_reason)
            else:
                self._stop = ("tool_use" if reason == "end_turn" and self._inputs else reason, None)

    def end(self) -> Iterator[str]:
        yield from self._close()
        delta = {"stop_reason": self._stop[0], "stop_sequence": self._stop[1]}
        yield event({"type": "message_delta", "delta": delta, "usage": self._usage()}, "message_delta")
        yield event({"type": "message_stop"}, "message_stop")

    def failed(self, error: TwofoldError) -> Iterator[str]:
        yield event(describe(error).anthropic_body, "error")

    def _add(self, kind: str, delta: str, field: str, text: str) -> Iterator[str]:
        if not self._is_open or self._blocks[-1]["type"] != kind:
            yield from self._open({"type": kind, field: ""} | ({"signature": ""} if kind == "thinking" else {}))
        self._blocks[-1][field] += text
        yield self._delta(delta, field, text)

    def _delta(self, kind: str, field: str, text: str) -> str:
        body = {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": {"type": kind, field: text}}
        return event(body, "content_block_delta")

    def _open(self, block: dict[str, Any]) -> Iterator[str]:
        yield from self._close()
        self._blocks.append(block)
        self._is_open = True
        body = {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": block}
        yield event(body, "content_block_start")

    def _close(self) -> Iterator[str]:
        if self._is_open:
            self._is_open = False
            yield event({"type": "content_block_stop", "index": len(self._blocks) - 1}, "content_block_stop")

    def _object(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": self._blocks,
            "stop_reason": self._stop[0],
            "stop_sequence": self._stop[1],
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, int]:
        return {
            "input_tokens": self.num_prompt_tokens - self.num_cached_tokens,
            "cache_read_input_tokens": self.num_cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": self.num_tokens,
        }
