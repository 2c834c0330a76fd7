"""OpenAI's responses: their requests, as a chat has them, and their answers, whole or as events. Nothing is stored."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal
from uuid import uuid4

from pydantic import Field, PlainValidator, WithJsonSchema

from twofold.chat.conversation import Conversation
from twofold.chat.messages import checked_text
from twofold.chat.pieces import Arguments, Call, Text, Thought
from twofold.chat.tools import Tools
from twofold.engine.async_engine import Answer
from twofold.errors import RequestError, TwofoldError
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
    make_params,
)

TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text", "refusal")
FINISHED = {"stop": ("completed", None), "length": ("incomplete", {"reason": "max_output_tokens"})}


def _text(content: Any, where: str) -> str:
    """The text of an item's content: a string, or parts."""
    if isinstance(content, str):
        return checked_text(content)
    texts = []
    for part in content if isinstance(content, list) else [None]:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if not isinstance(kind, str) or (kind in TEXT_PARTS and not isinstance(text, str)):
            raise ValueError(f"{where} must be a string or a list of {{'type': 'input_text', 'text': ...}}")
        if not isinstance(text, str):
            raise ValueError(f"{where} has a part of type {kind[:32]!r}, which is not supported; prompts are text only")
        texts.append(checked_text(text))
    return "\n".join(texts)


def _check_input(value: Any) -> Any:
    """→ messages of a chat."""
    if isinstance(value, str):
        return [{"role": "user", "content": checked_text(value)}]
    if not isinstance(value, list) or not value or len(value) > MAX_MESSAGES:
        raise ValueError(f"it must be a string or a list of 1 to {MAX_MESSAGES} items")
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(value):
        _add_item(messages, item, f"[{number}]")
    return messages


def _add_item(messages: list[dict[str, Any]], item: Any, where: str) -> None:
    """Adds an item to the messages. Calls, and what was thought before them, are parts of one message."""
    if not isinstance(item, dict):
        raise ValueError(f"{where} must be an object with a role or a type")
    match kind := item.get("type", "message"):
        case "message" if item.get("role") in ("user", "system", "developer"):
            messages.append({"role": item["role"], "content": _text(item.get("content"), f"{where}.content")})
        case "message" if item.get("role") == "assistant":
            text = _text(item.get("content"), f"{where}.content")
            _last_assistant(messages, "content")["content"] = text
        case "message":
            raise ValueError(f"{where}.role must be user, assistant, system or developer")
        case "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments", "{}")}
            if not all(isinstance(part, str) for part in (*function.values(), item.get("call_id"))):
                raise ValueError(f"{where} must have 'call_id', 'name' and 'arguments', which are strings")
            call = {"id": item["call_id"], "type": "function", "function": function}
            _last_assistant(messages).setdefault("tool_calls", []).append(call)
        case "function_call_output":
            if not isinstance(item.get("call_id"), str):
                raise ValueError(f"{where} must have 'call_id', a string")
            content = _text(item.get("output"), f"{where}.output")
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": content})
        case "reasoning":
            text = _text(item.get("content") or item.get("summary") or "", f"{where}.content")
            if text:
                _last_assistant(messages, "reasoning_content")["reasoning_content"] = text
        case str():
            raise ValueError(
                f"{where} has the type {kind[:32]!r}, which is not supported; send text and function calls"
            )
        case _:
            raise ValueError(f"{where}.type must be a string")


def _last_assistant(messages: list[dict[str, Any]], new: str = "") -> dict[str, Any]:
    """The message that the assistant is writing. What comes after the part `new`, or after calls, is another's."""
    if not messages or messages[-1]["role"] != "assistant" or (new and {new, "tool_calls"} & messages[-1].keys()):
        messages.append({"role": "assistant"})
    return messages[-1]


def _check_choice(value: Any) -> Any:
    match value:
        case "none" | "auto" | "required" | {"type": "function", "name": str()}:
            return value
    raise ValueError("it must be 'none', 'auto', 'required' or {'type': 'function', 'name': ...}")


_ITEM_SCHEMA = {
    "type": "object",
    "properties": {
        "role": {"enum": ["user", "assistant", "system", "developer"]},
        "type": {"enum": ["message", "function_call", "function_call_output", "reasoning"]},
        "content": {"type": "string"},
    },
}
Input = Annotated[
    Any,
    PlainValidator(_check_input),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _ITEM_SCHEMA, "minItems": 1}]}),
]
_NAMED_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "function"}, "name": {"type": "string"}},
    "required": ["type", "name"],
}
Choice = Annotated[
    Any,
    PlainValidator(_check_choice),
    WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, _NAMED_SCHEMA]}),
]


class FunctionTool(Body):
    type: Literal["function"]
    name: ToolName
    description: String | None = None
    parameters: dict[str, Any] | None = None
    strict: Flag | None = None


class Format(Body):
    type: Literal["text", "json_schema", "json_object"]
    name: String | None = None
    description: String | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: Flag | None = None

    def structured_outputs(self) -> StructuredOutputsParams | None:
        if self.type == "json_schema":
            if self.schema_ is None:
                raise RequestError("text.format has no schema; give one", field="text")
            return StructuredOutputsParams(json=self.schema_)
        return StructuredOutputsParams(json_object=True) if self.type == "json_object" else None


class TextOptions(Body):
    format: Format | None = None


class Reasoning(Body):
    effort: String | None = None
    summary: String | None = None  # the reasoning itself is told
    generate_summary: String | None = None


class ResponsesRequest(Body):
    max_values: ClassVar[int] = 300_000

    model: String | None = None
    input: Input
    instructions: String | None = None
    stream: Flag | None = None
    stream_options: dict[str, Any] | None = None  # it is about padding
    max_output_tokens: Integer | None = Field(None, ge=1, lt=2**31)
    temperature: Number | None = Field(None, ge=0, le=1e6)
    top_p: Number | None = Field(None, gt=0, le=1)
    tools: List[FunctionTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Choice | None = None
    parallel_tool_calls: Flag | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    include: List[Literal["reasoning.encrypted_content"]] | None = None  # the reasoning is not encrypted
    metadata: dict[str, Any] | None = None

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        names = ("temperature", "top_p")
        given: dict[str, Any] = {name: value for name in names if (value := getattr(self, name)) is not None}
        form = self.text.format.structured_outputs() if self.text is not None and self.text.format is not None else None
        return make_params(given | {"max_tokens": self.max_output_tokens, "structured_outputs": form}, defaults)

    def conversation(self) -> Conversation:
        messages = list(self.input)
        if self.instructions:
            messages.insert(0, {"role": "system", "content": self.instructions})
        given = [
            {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type", "strict"})}
            for tool in self.tools or ()
        ]
        choice: Any = self.tool_choice or "auto"
        named = isinstance(choice, dict)
        tools = Tools(
            given, choice["name"] if named else choice, is_named=named, at_most_one=self.parallel_tool_calls is False
        )
        return Conversation(messages, tools, effort=self.reasoning.effort if self.reasoning is not None else None)


class ResponsesWriter(Writer):
    """Writes items: one for each stretch of reasoning or content, and one for each call."""

    def __init__(self, answer: Answer, model: str, request: ResponsesRequest, pieces: Pieces) -> None:
        super().__init__(answer, model)
        self.id = f"resp_{uuid4().hex}"
        self._request, self._pieces = request, pieces
        self._items: list[dict[str, Any]] = []
        self._is_open = False  # the last item
        self._number = 0  # of the next event
        self._status, self._reason = FINISHED["stop"]

    def whole(self, parts: list[Part]) -> dict[str, Any]:
        for part in parts:
            for _ in self.events(part):
                pass
        for _ in self._close_item():
            pass
        return self._object()

    def begin(self) -> Iterator[str]:
        self._status = "in_progress"
        yield self._event("response.created", response=self._object())
        yield self._event("response.in_progress", response=self._object())

    def events(self, part: Part) -> Iterator[str]:
        index, _, completion = part
        for piece in self._pieces.of(index, completion):
            match piece:
                case Text(text):
                    yield from self._add_text("message", text)
                case Thought(text):
                    yield from self._add_text("reasoning", text)
                case Call(name):
                    yield from self._close_item()
                    call_id = self._pieces.call_id()
                    yield from self._open_item("fc", "function_call", call_id=call_id, name=name, arguments="")
                case Arguments(text):
                    item = self._items[-1]
                    item["arguments"] += text
                    yield self._item_event("response.function_call_arguments.delta", delta=text)
        if completion.finish_reason is not None:
            self._status, self._reason = FINISHED.get(completion.finish_reason, ("incomplete", None))

    def end(self) -> Iterator[str]:
        yield from self._close_item()
        yield self._event(f"response.{self._status}", response=self._object())

    def failed(self, error: TwofoldError) -> Iterator[str]:
        self._status = "failed"
        told = describe(error).body["error"]
        response = self._object() | {"error": {"code": told["code"] or "server_error", "message": told["message"]}}
        yield self._event("response.failed", response=response)

    # Items

    def _add_text(self, kind: str, text: str) -> Iterator[str]:
        is_message = kind == "message"
        if not self._is_open or self._items[-1]["type"] != kind:
            yield from self._close_item()
            if is_message:
                yield from self._open_item("msg", kind, role="assistant", content=[])
            else:
                yield from self._open_item("rs", kind, summary=[], content=[], encrypted_content=None)
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self._items[-1]["content"].append(part if is_message else {"type": "reasoning_text", "text": ""})
            yield self._part_event("response.content_part.added")
        self._items[-1]["content"][0]["text"] += text
        yield self._text_event("delta", delta=text)

    def _open_item(self, prefix: str, kind: str, **fields: Any) -> Iterator[str]:
        item = {"id": f"{prefix}_{uuid4().hex}", "type": kind, "status": "in_progress", **fields}
        self._items.append(item)
        self._is_open = True
        yield self._event("response.output_item.added", output_index=len(self._items) - 1, item=item)

    def _close_item(self) -> Iterator[str]:
        if not self._is_open:
            return
        self._is_open = False
        item = self._items[-1]
        item["status"] = "completed" if self._status in ("in_progress", "completed") else "incomplete"
        if item["type"] == "function_call":
            named = {"name": item["name"], "arguments": item["arguments"]}
            yield self._item_event("response.function_call_arguments.done", **named)
        else:
            yield self._text_event("done", text=item["content"][0]["text"])
            yield self._part_event("response.content_part.done")
        yield self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def _text_event(self, kind: str, **fields: Any) -> str:
        if self._items[-1]["type"] == "message":
            return self._item_event(f"response.output_text.{kind}", content_index=0, logprobs=[], **fields)
        return self._item_event(f"response.reasoning_text.{kind}", content_index=0, **fields)

    def _part_event(self, name: str) -> str:
        return self._item_event(name, content_index=0, part=self._items[-1]["content"][0])

    def _item_event(self, kind: str, **fields: Any) -> str:
        return self._event(kind, item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> str:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number - 1, **fields}, kind)

    def _object(self) -> dict[str, Any]:
        request, params = self._request, self.answer.params
        text = request.text.model_dump(exclude_none=True, by_alias=True) if request.text is not None else {}
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": self._status,
            "background": False,
            "error": None,
            "incomplete_details": self._reason if self._status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": self.model,
            "output": self._items,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": request.reasoning.effort if request.reasoning else None, "summary": None},
            "store": False,
            "temperature": params.temperature,
            "text": {"format": {"type": "text"}} | text,
            "tool_choice": request.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in request.tools or ()],
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None if self._status == "in_progress" else self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        return {
            "input_tokens": self.num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": self.num_cached_tokens},
            "output_tokens": self.num_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},  # they are not counted apart
            "total_tokens": self.num_prompt_tokens + self.num_tokens,
        }
