"""Write the engine's outputs as OpenAI's objects: completions and chats, whole or in chunks."""

import json
import math
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import uuid4

from twofold.engine.async_engine import Answer, merge
from twofold.errors import TwofoldError
from twofold.outputs import CompletionOutput, Logprob, RequestOutput
from twofold.server.errors import describe
from twofold.server.protocol import ChatRequest, CompletionRequest

KEEP_ALIVE_SECONDS = 15.0
LOWEST = -9999.0  # in place of minus infinity, which JSON does not have


class Writer:
    """Writes one answer. Subclasses make the choices. A choice is one of the `n` answers to one of the prompts."""

    prefix: str
    whole: str
    chunk: str

    def __init__(self, answer: Answer, model: str) -> None:
        self.answer, self.n = answer, answer.params.n
        self.head: dict[str, Any] = {"id": f"{self.prefix}-{uuid4().hex}", "created": int(time.time()), "model": model}
        self._num_tokens = 0
        self._cached: dict[int, int] = {}  # index of a prompt -> its tokens that were in the prefix cache
        self._begun: set[int] = set()  # indices of choices
        self._ended: set[int] = set()

    def choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        """A whole choice."""
        raise NotImplementedError

    def pieces(self, index: int, output: RequestOutput, completion: CompletionOutput) -> Iterator[dict[str, Any]]:
        """Chunks with what is new of a choice."""
        raise NotImplementedError

    def count(self, completion: CompletionOutput) -> int:
        return len(completion.token_ids)

    def usage(self) -> dict[str, Any]:
        num_prompt_tokens = sum(len(part.token_ids) for part in self.answer.parts)
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": self._num_tokens,
            "total_tokens": num_prompt_tokens + self._num_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }

    def _take(self, number: int, output: RequestOutput) -> Iterator[tuple[int, CompletionOutput]]:
        """Counts a prompt's delta → index and delta of each choice that had not ended."""
        self._cached[number] = output.num_cached_tokens
        for completion in output.outputs:
            index = number * self.n + completion.index
            if index not in self._ended:
                self._num_tokens += self.count(completion)
                yield index, completion
                if completion.finish_reason is not None:
                    self._ended.add(index)

    async def write(self) -> dict[str, Any]:
        """The whole answer, when it is finished."""
        outputs: dict[int, RequestOutput] = {}
        while (item := await self.answer.read()) is not None:
            if not isinstance(item, str):
                number, output = item
                outputs[number] = merge(outputs[number], output) if number in outputs else output
        choices = [
            self.choice(index, output, completion)
            for number, output in sorted(outputs.items())
            for index, completion in self._take(number, output)
        ]
        return self._object(self.whole, choices=choices, usage=self.usage(), system_fingerprint=None)

    async def stream(self, include_usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events. Comments tell the progress of the prefill; clients skip them."""
        usage = {"usage": None} if include_usage else {}
        try:
            async for item in self.answer.read_all(KEEP_ALIVE_SECONDS):
                if isinstance(item, str):
                    yield f": {item}\n\n"
                    continue
                number, output = item
                for index, completion in self._take(number, output):
                    for piece in self.pieces(index, output, completion):
                        yield _event(self._object(self.chunk, choices=[{"index": index, **piece}], **usage))
        except TwofoldError as error:
            yield _event(describe(error).body)
            return
        if include_usage:
            yield _event(self._object(self.chunk, choices=[], usage=self.usage()))
        yield "data: [DONE]\n\n"

    def _object(self, kind: str, **rest: Any) -> dict[str, Any]:
        head = self.head
        return {"id": head["id"], "object": kind, "created": head["created"], "model": head["model"], **rest}


class CompletionWriter(Writer):
    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, answer: Answer, model: str, request: CompletionRequest, echoed: list[str] | None) -> None:
        super().__init__(answer, model)
        self.only_echo, self.num_logprobs, self.echoed = request.only_echo, request.logprobs, echoed
        self._offsets: dict[int, int] = {}  # index of a choice -> characters of its tokens so far

    def count(self, completion: CompletionOutput) -> int:
        return 0 if self.only_echo else len(completion.token_ids)

    def choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        return {"index": index, **self._piece(index, output, completion)}

    def pieces(self, index: int, output: RequestOutput, completion: CompletionOutput) -> Iterator[dict[str, Any]]:
        piece = self._piece(index, output, completion)
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


class ChatWriter(Writer):
    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, answer: Answer, model: str, request: ChatRequest) -> None:
        super().__init__(answer, model)
        self.num_logprobs = (request.top_logprobs or 0) if request.logprobs else None

    def choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": self._logprobs(completion),
            "finish_reason": completion.finish_reason,
        }

    def pieces(self, index: int, output: RequestOutput, completion: CompletionOutput) -> Iterator[dict[str, Any]]:
        if index not in self._begun:
            self._begun.add(index)
            yield _delta({"role": "assistant", "content": ""})
        logprobs = self._logprobs(completion)
        if completion.text or (logprobs and logprobs["content"]):
            yield _delta({"content": completion.text}, logprobs)
        if completion.finish_reason is not None:
            yield _delta({}, finish_reason=completion.finish_reason)

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
    delta: dict[str, str], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _rank(item: tuple[int, Logprob]) -> int:
    """Key that sorts log-probabilities, the most likely token first."""
    return item[1].rank or 0


def _text(one: Logprob) -> str:
    return one.decoded_token or ""


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LOWEST


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
