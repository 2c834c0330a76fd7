"""What a model's chat template says about its answers, and the parser of one answer."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from twofold.chat.conversation import Conversation
from twofold.chat.messages import REASONING_FIELDS
from twofold.chat.pieces import Arguments, Call, Feed, Piece, Steps, Text, Thought, dump, json_calls
from twofold.chat.tool_formats import FORMATS, ToolFormat
from twofold.chat.tools import Tools
from twofold.errors import ConfigError
from twofold.sampling_params import Reasoning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_THINK, _BRACKETS = ("<think>", "</think>"), ("[THINK]", "[/THINK]")
REASONING = {  # by vLLM's names: what stands before and after reasoning
    "deepseek_r1": _THINK,
    "qwen3": _THINK,
    "glm45": _THINK,
    "mistral": _BRACKETS,
}


CHOICES = ("auto", "none")
_HARMONY_START, _HARMONY_FINAL = "<|start|>assistant", "<|channel|>final<|message|>"


@dataclass(frozen=True)
class AnswerFormat:
    """How a model writes calls of tools and its reasoning.

    response_template: the tokenizer's own description of answers, for Transformers' parser; it goes before all else.
    special_tokens: those that are left out of texts.
    ids: token ids of the texts around reasoning, where other tokens cannot hold a part of these.
    """

    tools: ToolFormat | None = None
    reasoning: tuple[str, str] | None = None
    response_template: dict[str, Any] | None = None
    special_tokens: frozenset[str] = field(default=frozenset(), repr=False)
    ids: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False)

    @property
    def finds_calls(self) -> bool:
        return self.tools is not None or self.response_template is not None

    def keeps_special_tokens(self, tools: Tools, *, is_constrained: bool = False, reasons: bool = False) -> bool:
        """Whether calls and reasoning can only be found with special tokens in the text.

        is_constrained: whether the answer has a form. reasons: whether reasoning may come before that.
        """
        if tools.is_forced or is_constrained:
            return reasons and not self.special_tokens.isdisjoint(self._tokens(tools))
        return self.response_template is not None or not self.special_tokens.isdisjoint(self._tokens(tools))

    @property
    def _is_harmony(self) -> bool:
        return self.tools is FORMATS["openai"]

    def _tokens(self, tools: Tools) -> set[str]:
        calls = self.tools.tokens if self.tools is not None and (tools.are_offered or self._is_harmony) else ()
        return {*calls, *(self.reasoning or ())}

    def reasoning_before_form(self, prompt: str, chat: Conversation) -> Reasoning | None:
        """The reasoning that may come before the form of an answer to `prompt`.

        None: there is none, the prompt has ended it, or the tokens that end it are not known.
        """
        if chat.effort == "none" or chat.thinks is False or chat.continue_final_message:
            return None
        if self._is_harmony and _HARMONY_FINAL in self.ids:
            begins = prompt.endswith(_HARMONY_START) and not chat.tools.is_forced
            return Reasoning(self.ids[_HARMONY_FINAL]) if begins else None
        if self.reasoning is None or not {*self.reasoning} <= self.ids.keys():
            return None
        before, after = self.reasoning
        if prompt.rstrip().endswith(before):
            return Reasoning(self.ids[after])
        [begin] = self.ids[before]
        return None if prompt.rstrip().endswith(after) else Reasoning(self.ids[after], begin)

    def forced_prompt(self, prompt: str) -> str:
        """The prompt for an answer that has its form from the first token on: the reasoning is over."""
        if self._is_harmony and prompt.endswith(_HARMONY_START):
            return prompt + _HARMONY_FINAL
        if self.reasoning is not None and prompt.rstrip().endswith(self.reasoning[0]):
            return f"{prompt.rstrip()}\n\n{self.reasoning[1]}\n\n"
        return prompt

    @property
    def has_short_ids(self) -> bool:
        return self.tools is not None and self.tools.short_ids

    def parser(
        self,
        prompt: str,
        tools: Tools,
        *,
        is_constrained: bool = False,
        reasons: bool = False,
        leaves_out: bool = True,
    ) -> "AnswerParser | None":
        """The parser of an answer to `prompt`; None if all of the answer is content.

        is_constrained, reasons: see `keeps_special_tokens`.
        leaves_out: whether special tokens that no format knows are left out of the content.
        """
        is_constrained = is_constrained or tools.is_forced
        feed = Feed()
        if is_constrained:
            steps = self._constrained_steps(feed, prompt, tools, reasons)
        else:
            steps = self._steps(feed, prompt, tools)
        if steps is None:
            return None
        left_out: frozenset[str] = frozenset()
        keeps = self.keeps_special_tokens(tools, is_constrained=is_constrained, reasons=reasons)
        if leaves_out and keeps and (is_constrained or self.response_template is None):
            left_out = self.special_tokens - self._tokens(tools)
        return AnswerParser(feed, steps, left_out, 1 if tools.at_most_one else None)

    def _constrained_steps(self, feed: Feed, prompt: str, tools: Tools, reasons: bool) -> Steps[None] | None:
        if reasons and self._is_harmony:
            assert self.tools is not None
            return self.tools.parse(feed, tools.schemas)
        rest = None
        if tools.is_forced:
            rest = json_calls(feed) if tools.forced_name is None else _named(feed, tools.forced_name)
        return self._after_reasoning(feed, prompt, rest or feed.pass_on([])) if reasons else rest

    def _steps(self, feed: Feed, prompt: str, tools: Tools) -> Steps[None] | None:
        if self.response_template is not None:
            return _by_response_template(feed, self.response_template, prompt, tools)
        if self.tools is not None and (self._is_harmony or tools.are_offered):
            steps: Steps[Any] = self.tools.parse(feed, tools.schemas)
            return steps if self._is_harmony else self._after_reasoning(feed, prompt, steps)
        return None if self.reasoning is None else self._after_reasoning(feed, prompt, feed.pass_on([]))

    def _after_reasoning(self, feed: Feed, prompt: str, rest: Steps[Any]) -> Steps[None]:
        if self.reasoning is not None:
            before, after = self.reasoning
            inside = prompt.rfind(before) > prompt.rfind(after) and prompt.rstrip().endswith(before)
            while not inside and not feed.ended and before.startswith(feed.text.lstrip()):
                yield None
            if not inside and feed.text.lstrip().startswith(before):
                feed.text, inside = feed.text.lstrip().removeprefix(before), True
            if inside:
                yield from feed.pass_on([after], Thought)
        yield from rest


def _named(feed: Feed, name: str) -> Steps[None]:
    yield Call(name)
    yield from feed.pass_on([], Arguments)


def _by_response_template(feed: Feed, template: dict[str, Any], prompt: str, tools: Tools) -> Steps[None]:
    """As Transformers' parser reads it. The prompt says in which part of the message the answer begins."""
    from transformers.utils.chat_parsing import ResponseParser

    parser = ResponseParser(template, prefix=prompt, tools=list(tools.offered))
    kinds: dict[str, type[Text | Thought]] = {"content": Text, **dict.fromkeys(REASONING_FIELDS, Thought)}
    ended = False
    while not ended:
        text, feed.text, ended = feed.text, "", feed.ended
        try:
            events = parser.feed(text)
            if ended:
                events += parser.finalize()[1]
        except ValueError:  # a call that is no JSON; the parser cannot go on
            yield Text(text)
            yield from feed.pass_on([])
            return
        for event in events:
            kind = kinds.get(event["field"])
            if event["type"] == "region_chunk" and kind is not None:
                yield kind(event["text"])
            elif event["type"] == "region_close" and event["field"] == "tool_calls":
                for call in event["value"] if isinstance(event["value"], list) else [event["value"]]:
                    function = call.get("function", call)
                    arguments = function.get("arguments") or {}
                    yield Call(str(function.get("name")))
                    yield Arguments(arguments if isinstance(arguments, str) else dump(arguments))
        yield None


class AnswerParser:
    """Cuts the text of one answer into pieces.

    White space around reasoning and calls is left out, and so are `left_out`, special tokens that are no one's content.
    """

    def __init__(self, feed: Feed, steps: Steps[None], left_out: frozenset[str], max_calls: int | None) -> None:
        self._feed, self._steps = feed, steps
        self._left_out = re.compile("|".join(map(re.escape, left_out))) if left_out else None
        self._max_calls = max_calls
        self._kind: type[Piece] | None = None  # of the last piece
        self._has_begun = True  # whether a text of this kind has more than white space; an answer's first has
        self._space = ""  # that may be followed by text of the same kind
        self._num_calls = 0

    def feed(self, text: str) -> list[Piece]:
        """Pieces that are certain with `text`, the next part of the answer."""
        self._feed.text += self._left_out.sub("", text) if self._left_out is not None else text
        return [tidy for piece in self._run() for tidy in self._tidy(piece)]

    def finish(self) -> list[Piece]:
        """The last pieces."""
        self._feed.ended = True
        pieces = [tidy for piece in self._run() for tidy in self._tidy(piece)]
        if self._kind is Call and self._allows_call:
            pieces.append(Arguments("{}"))
        if self._space and self._kind in (Text, None):
            pieces.append(Text(self._space))
        return pieces

    def _run(self) -> list[Piece]:
        pieces: list[Piece] = []
        for piece in self._steps:
            if piece is not None:
                pieces.append(piece)
            elif not self._feed.ended:
                break
        return pieces

    @property
    def _allows_call(self) -> bool:
        return self._max_calls is None or self._num_calls <= self._max_calls

    def _tidy(self, piece: Piece) -> list[Piece]:
        if isinstance(piece, Arguments):
            self._kind = Arguments
            return [piece] if self._allows_call and piece.text else []
        before: list[Piece] = [Arguments("{}")] if self._kind is Call and self._allows_call else []
        if isinstance(piece, Call):
            self._kind, self._space = Call, ""
            self._num_calls += 1
            return [*before, piece] if self._allows_call else before
        if self._kind not in (None, type(piece)) or (self._kind is None and isinstance(piece, Thought)):
            self._space, self._has_begun = "", False
        self._kind = type(piece)
        text = self._space + piece.text
        if not self._has_begun:
            text = text.lstrip()
        kept = text.rstrip()
        self._space = text[len(kept) :]
        if not kept:
            return before
        self._has_begun = True
        return [*before, type(piece)(kept)]


def answer_format(
    tokenizer: "PreTrainedTokenizerBase",
    template: str | None,
    tool_parser: str = "auto",
    reasoning_parser: str = "auto",
) -> AnswerFormat:
    """What the template of a model's chats says about its answers, unless the parsers are named.

    Raises:
        ConfigError: there is no such parser.
    """
    check_parsers(tool_parser, reasoning_parser)
    template = template or ""
    own = getattr(tokenizer, "response_template", None)
    if tool_parser == "auto":
        tools = next((one for one in FORMATS.values() if re.search(one.shown_by, template)), None)
    else:
        tools, own = FORMATS.get(tool_parser), None
    if reasoning_parser == "auto":
        reasoning = next((one for one in (_THINK, _BRACKETS) if one[1] in template), None)
    else:
        reasoning = REASONING.get(reasoning_parser)
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    ids = {text: (added[text],) for text in reasoning or () if text in added}
    if tools is FORMATS["openai"] and {"<|channel|>", "<|message|>"} <= added.keys():
        final = tokenizer.encode("final", add_special_tokens=False)
        ids[_HARMONY_FINAL] = (added["<|channel|>"], *final, added["<|message|>"])
    return AnswerFormat(tools, reasoning, own if isinstance(own, dict) else None, frozenset(special), ids)


def check_parsers(tool_parser: str, reasoning_parser: str) -> None:
    """Raises ConfigError for parsers that there are not."""
    given: list[tuple[str, str, Mapping[str, Any]]] = [
        ("tool_call_parser", tool_parser, FORMATS),
        ("reasoning_parser", reasoning_parser, REASONING),
    ]
    for field_name, name, known in given:
        if name not in (*CHOICES, *known):
            message = f"{field_name} must be one of {', '.join((*CHOICES, *known))}, got {name!r}"
            raise ConfigError(message, field=field_name)
