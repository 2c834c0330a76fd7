"""Turn the messages of a chat into a prompt, by the model's chat template.

A template is a program that came with the model, so a helper process renders it.
"""

import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from transformers.utils.chat_template_utils import render_jinja_template

from twofold.chat.answers import AnswerFormat, answer_format
from twofold.chat.conversation import Conversation
from twofold.chat.messages import check_template_takes_tools, for_template
from twofold.server.errors import APIError
from twofold.server.helper import Helper, LimitError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SECONDS = 5.0


class Template(Protocol):
    """What makes prompts of chats, and says how the model writes its answers."""

    answers: AnswerFormat
    close: Callable[[], None]

    async def render(self, chat: Conversation, *, is_constrained: bool) -> str | list[int] | int:
        """→ the text of the prompt, or its token ids; or its number of characters, if there are too many."""


class ChatTemplate:
    """The chat template of a tokenizer, or another in its place. No prompt has more than `max_chars` characters.

    Raises:
        ConfigError: there is no parser of that name.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        max_chars: int,
        template: str | None = None,
        tool_call_parser: str = "auto",
        reasoning_parser: str = "auto",
    ) -> None:
        self._tokenizer, self._max_chars, self._template = tokenizer, max_chars, template
        self._reserved = {
            *inspect.signature(tokenizer.apply_chat_template).parameters,
            *inspect.signature(render_jinja_template).parameters,
            "messages",
        }
        own = tokenizer.chat_template
        text = template or ("\n".join(own.values()) if isinstance(own, dict) else own)
        self.answers: AnswerFormat = answer_format(tokenizer, text, tool_call_parser, reasoning_parser)
        self._helper = Helper(__name__, "render", MAX_SECONDS)
        self.close = self._helper.close

    async def render(self, chat: Conversation, *, is_constrained: bool) -> str | int:
        """→ the text of the prompt; or its number of characters, if there are too many.

        `is_constrained`: the answer has to have a form, after its reasoning if that is known.

        Raises:
            APIError: the model has no template, or its template refuses the messages, the tools or the variables.
            RequestError: it takes no tools, or a message is none.
            UnavailableError: the helper was ended.
        """
        if self._tokenizer.chat_template is None and self._template is None:
            raise APIError(400, "the model has no chat template; use /v1/completions", param="messages")
        for name in chat.variables:
            if name in self._reserved:
                raise APIError(400, f"chat_template_kwargs cannot set {name[:64]!r}", param="chat_template_kwargs")
        tools = list(chat.tools.offered) or None
        try:
            template = self._tokenizer.get_chat_template(self._template, tools)
        except ValueError as error:  # there are several templates, and none is the default
            raise _refused(error) from error
        if tools:
            check_template_takes_tools(template)
            if not self.answers.finds_calls and not chat.tools.is_forced:
                message = "how the model writes calls of tools is not known; serve it with --tool-call-parser NAME"
                raise APIError(400, message, param="tools")
        variables = {
            **self._tokenizer.special_tokens_map,
            **_of_reasoning(chat, template),
            **chat.variables,
            "add_generation_prompt": chat.add_generation_prompt,
            "continue_final_message": chat.continue_final_message,
            "tools": tools,
        }
        messages = for_template(chat.messages, template)
        try:
            text: str | int = await self._helper.call(template, messages, variables, self._max_chars)
        except LimitError as error:
            message = f"the model's chat template takes {error} for these messages; send others, or fewer"
            raise APIError(400, message, param="messages") from None
        if isinstance(text, str) and is_constrained and self.answers.reasoning_before_form(text, chat) is None:
            text = self.answers.forced_prompt(text)
        return text


def _of_reasoning(chat: Conversation, template: str) -> dict[str, Any]:
    """Variables that many templates have for the reasoning. Others are not told of it."""
    variables: dict[str, Any] = {}
    if chat.effort is not None and chat.effort != "none":
        variables["reasoning_effort"] = chat.effort
    thinks = False if chat.effort == "none" else chat.thinks
    if thinks is not None:
        variables |= {"enable_thinking": thinks, "thinking": thinks}
    return {name: value for name, value in variables.items() if re.search(rf"\b{name}\b", template)}


def render(template: str, conversation: list[dict[str, Any]], variables: dict[str, Any], max_chars: int) -> str | int:
    """What `ChatTemplate.render` gives. Runs in the helper."""
    try:
        [text], _ = render_jinja_template([conversation], chat_template=template, **variables)
    except MemoryError:
        raise
    except Exception as error:  # a template can raise anything
        raise _refused(error) from error
    return text if len(text) <= max_chars else len(text)


def _refused(error: Exception) -> APIError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return APIError(400, f"the model's chat template refuses the messages: {reason}", param="messages")
