"""Write the engine's outputs as OpenAI's objects: completions and chats, whole or in chunks."""

import json
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any
from uuid import uuid4

from twofold.chat.answers import AnswerParser
from twofold.chat.pieces import Arguments, Call, Piece, Text, Thought
from twofold.engine.async_engine import Answer, merge
from twofold.errors import TwofoldError
from twofold.outputs import CompletionOutput, Logprob, RequestOutput
from twofold.server.errors import describe
from twofold.server.protocol import ChatRequest, CompletionRequest, Sampling, StreamOptions

KEEP_ALIVE_SECONDS = 15.0
LOWEST = -9999.0  # in place of minus infinity, which JSON does not have


Part = tuple[int, RequestOutput, CompletionOutput]  # index of a choice, and what is new of it


class Writer:
    """Writes one answer, whole or as events. A choice is one of the `n` answers to one of the prompts."""

    def __init__(self, answer: Answer, model: str) -> None:
        self.answer, self.model, self.n = answer, model, answer.params.n
        self.created = int(time.time())
        self.num_tokens = 0
        self._cached: dict[int, int] = {}  # index of a prompt -> its tokens that were in the prefix cache
        self._ended: set[int] = set()  # indices of choices

    def whole(self, parts: list[Part]) -> dict[str, Any]:
        """The answer when it is finished."""
        raise NotImplementedError

    def begin(self) -> Iterator[str]:
        """Events before all others."""
        yield from ()

    def events(self, part: Part) -> Iterator[str]:
        """Events with what is new of a choice."""
        raise NotImplementedError

    def end(self) -> Iterator[str]:
        """Events after all others."""
        yield from ()

    def failed(self, error: TwofoldError) -> Iterator[str]:
        """The last events, if the answer ends with an error."""
        yield event(describe(error).body)

    def count(self, completion: CompletionOutput) -> int:
        return len(completion.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(part.token_ids) for part in self.answer.parts)

    @property
    def num_cached_tokens(self) -> int:
        return sum(self._cached.values())

    def _take(self, number: int, output: RequestOutput) -> Iterator[Part]:
        """Counts a prompt's delta → index and delta of each choice that had not ended."""
        self._cached[number] = output.num_cached_tokens
        for completion in output.outputs:
            index = number * self.n + completion.index
            if index not in self._ended:
                self.num_tokens += self.count(completion)
                yield index, output, completion
                if completion.finish_reason is not None:
                    self._ended.add(index)

    async def write(self) -> dict[str, Any]:
        """The whole answer, when it is finished."""
        outputs: dict[int, RequestOutput] = {}
        while (item := await self.answer.read()) is not None:
            if not isinstance(item, str):
                number, output = item
                outputs[number] = merge(outputs[number], output) if number in outputs else output
        return self.whole([part for number, output in sorted(outputs.items()) for part in self._take(number, output)])

    async def stream(self) -> AsyncIterator[str]:
        """The answer as server-sent events. Comments tell the progress of the prefill; clients skip them."""
        for line in self.begin():
            yield line
        try:
            async for item in self.answer.read_all(KEEP_ALIVE_SECONDS):
                if isinstance(item, str):
                    yield f": {item}\n\n"
                    continue
                for part in self._take(*item):
                    for line in self.events(part):
                        yield line
        except TwofoldError as error:
            for line in self.failed(error):
                yield line
            return
        for line in self.end():
            yield line


class ChoicesWriter(Writer):
    """Writes OpenAI's objects with choices: one choice after the other, or chunks with pieces of them."""

    prefix: str
    object: str
    chunk: str

    def __init__(self, answer: Answer, model: str, request: Sampling) -> None:
        super().__init__(answer, model)
        self.id = f"{self.prefix}-{uuid4().hex}"
        self._options = request.stream_options or StreamOptions()
        self._begun: set[int] = set()  # indices of choices

    def choice(self, part: Part) -> dict[str, Any]:
        """A whole choice."""
        raise NotImplementedError

    def pieces(self, part: Part) -> Iterator[dict[str, Any]]:
        """Chunks with what is new of a choice."""
        raise NotImplementedError

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }

    def whole(self, parts: list[Part]) -> dict[str, Any]:
        choices = [{"index": part[0], **self.choice(part)} for part in parts]
        return self._object(self.object, choices=choices, usage=self.usage(), system_fingerprint=None)

    def events(self, part: Part) -> Iterator[str]:
        for piece in self.pieces(part):
            usage = {}
            if self._options.include_usage:
                usage["usage"] = self.usage() if self._options.continuous_usage_stats else None
            yield event(self._object(self.chunk, choices=[{"index": part[0], **piece}], **usage))

    def end(self) -> Iterator[str]:
        if self._options.include_usage:
            yield event(self._object(self.chunk, choices=[], usage=self.usage()))
        yield "data: [DONE]\n\n"

    def _object(self, kind: str, **rest: Any) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, **rest}


class CompletionWriter(ChoicesWriter):
    prefix, object, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, answer: Answer, model: str, request: CompletionRequest, echoed: list[str] | None) -> None:
        super().__init__(answer, model, request)
        self.only_echo, self.num_logprobs, self.echoed = request.only_echo, request.logprobs, echoed
        self._offsets: dict[int, int] = {}  # index of a choice -> characters of its tokens so far

    def count(self, completion: CompletionOutput) -> int:
        return 0 if self.only_echo else len(completion.token_ids)

    def choice(self, part: Part) -> dict[str, Any]:
        return self._piece(*part)

    def pieces(self, part: Part) -> Iterator[dict[str, Any]]:
        piece = self._piece(*part)
        if piece["text"] or piece["finish_reason"] or (piece["logprobs"] and piece["logprobs"]["tokens"]):
            yield piece

    def _piece(self, index: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        text, entries = completion.text, list(completion.logprobs or ())
        if self.only_echo:
            text, entries = "", []
        prompt_entries: list[dict[int, Logprob] | None] = []
        if index not in self._begun and self.echoed is not None:
            text = self.echoed[index // self.n] + text
            prompt_entries = list(output.prompt_logprobs or ())
        first = output.prompt_token_ids[0] if prompt_entries else 0
        self._begun.add(index)
        asked = self.num_logprobs is not None
        return {
            "text": text,
            "logprobs": self._logprobs(index, first, [*prompt_entries, *entries]) if asked else None,
            "finish_reason": "length" if self.only_echo else completion.finish_reason,
        }

    def _logprobs(self, index: int, first: int, entries: list[dict[int, Logprob] | None]) -> dict[str, list[Any]]:
        """The form of legacy completions. The first token of a prompt has no log-probability."""
        form: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        offset = self._offsets.get(index, 0)
        for entry in entries:
            if entry is None:
                token, logprob, top = self.answer.decode([first]), None, None
            else:
                chosen = next(iter(entry.values()))
                token, logprob = _text(chosen), _finite(chosen.logprob)
                top = {_text(one): _finite(one.logprob) for _, one in sorted(entry.items(), key=_rank)}
            for name, value in zip(form, (token, logprob, top, offset), strict=True):
                form[name].append(value)
            offset += len(token)
        self._offsets[index] = offset
        return form


class Pieces:
    """Cuts the choices of an answer into content, reasoning and calls. `parse` makes a parser, or None for content."""

    def __init__(self, parse: Callable[[], AnswerParser | None], short_ids: bool) -> None:
        self._parse, self._short_ids = parse, short_ids
        self._parsers: dict[int, AnswerParser | None] = {}

    def of(self, index: int, completion: CompletionOutput) -> list[Piece]:
        if index not in self._parsers:
            self._parsers[index] = self._parse()
        parser = self._parsers[index]
        if parser is None:
            return [Text(completion.text)] if completion.text else []
        pieces = parser.feed(completion.text)
        return pieces + parser.finish() if completion.finish_reason is not None else pieces

    def call_id(self) -> str:
        return uuid4().hex[:9] if self._short_ids else f"call_{uuid4().hex[:24]}"


class ChatWriter(ChoicesWriter):
    prefix, object, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, answer: Answer, model: str, request: ChatRequest, pieces: Pieces) -> None:
        super().__init__(answer, model, request)
        self.num_logprobs = (request.top_logprobs or 0) if request.logprobs else None
        self._shows_reasoning = request.include_reasoning is not False
        self._pieces = pieces
        self._num_calls: Counter[int] = Counter()  # by index of the choice

    def choice(self, part: Part) -> dict[str, Any]:
        index, _, completion = part
        message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
        calls: list[dict[str, Any]] = []
        for delta in self._deltas(index, completion):
            for name in delta.keys() - {"tool_calls"}:
                message[name] = (message.get(name) or "") + delta[name]
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    calls.append({name: value for name, value in call.items() if name != "index"})
                else:
                    calls[-1]["function"]["arguments"] += call["function"]["arguments"]
        if calls:
            message["tool_calls"] = calls
        else:
            message["content"] = message["content"] or ""
        logprobs, reason = self._logprobs(completion), self._finish_reason(index, completion)
        return {"message": message, "logprobs": logprobs, "finish_reason": reason}

    def pieces(self, part: Part) -> Iterator[dict[str, Any]]:
        index, _, completion = part
        if index not in self._begun:
            self._begun.add(index)
            yield _delta({"role": "assistant", "content": ""})
        logprobs = self._logprobs(completion)
        deltas = list(self._deltas(index, completion))
        if logprobs and logprobs["content"] and not deltas:
            deltas = [{"content": ""}]
        for number, delta in enumerate(deltas):
            yield _delta(delta, logprobs if number == 0 else None)
        if completion.finish_reason is not None:
            yield _delta({}, finish_reason=self._finish_reason(index, completion))

    def _deltas(self, index: int, completion: CompletionOutput) -> Iterator[dict[str, Any]]:
        for piece in self._pieces.of(index, completion):
            match piece:
                case Text(text):
                    yield {"content": text}
                case Thought(text):
                    if self._shows_reasoning:
                        yield {"reasoning_content": text}
                case Call(name):
                    function = {"name": name, "arguments": ""}
                    call = {"id": self._pieces.call_id(), "type": "function", "function": function}
                    yield {"tool_calls": [{"index": self._num_calls[index], **call}]}
                    self._num_calls[index] += 1
                case Arguments(text):
                    yield {"tool_calls": [{"index": self._num_calls[index] - 1, "function": {"arguments": text}}]}

    def _finish_reason(self, index: int, completion: CompletionOutput) -> str | None:
        calls = completion.finish_reason == "stop" and self._num_calls[index]
        return "tool_calls" if calls else completion.finish_reason

    def _logprobs(self, completion: CompletionOutput) -> dict[str, Any] | None:
        if self.num_logprobs is None:
            return None
        content = []
        for entry in completion.logprobs or ():
            best = [self._logprob(*one) for one in sorted(entry.items(), key=_rank)[: self.num_logprobs]]
            content.append({**self._logprob(*next(iter(entry.items()))), "top_logprobs": best})
        return {"content": content, "refusal": None}

    def _logprob(self, token_id: int, one: Logprob) -> dict[str, Any]:
        text = _text(one)
        return {"token": text, "logprob": _finite(one.logprob), "bytes": list(self.answer.bytes_of(token_id, text))}


def _delta(
    delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _rank(item: tuple[int, Logprob]) -> int:
    """Key that sorts log-probabilities, the most likely token first."""
    return item[1].rank or 0


def _text(one: Logprob) -> str:
    return one.decoded_token or ""


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LOWEST


def event(body: dict[str, Any], name: str | None = None) -> str:
    """A server-sent event."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
