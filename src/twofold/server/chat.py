"""Turn the messages of a chat into a prompt, by the model's chat template.

A template is a program that came with the model, so a helper process renders it.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers.utils.chat_template_utils import render_jinja_template

from twofold.server.errors import APIError
from twofold.server.helper import Helper, LimitError
from twofold.server.protocol import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SECONDS = 5.0


class ChatTemplate:
    """The chat template of a tokenizer. No prompt has more than `max_chars` characters."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", max_chars: int) -> None:
        self._tokenizer, self._max_chars = tokenizer, max_chars
        self._reserved = {
            *inspect.signature(tokenizer.apply_chat_template).parameters,
            *inspect.signature(render_jinja_template).parameters,
            "messages",
        }
        self._helper = Helper(__name__, "render", MAX_SECONDS)
        self.close = self._helper.close

    async def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, kwargs: Mapping[str, Any] | None
    ) -> str | int:
        """→ the text of the prompt; or its number of characters, if there are too many.

        `kwargs` are variables of the template: a request's `chat_template_kwargs`.

        Raises:
            APIError: the model has no template, or its template refuses the messages or the variables.
            UnavailableError: the helper was ended.
        """
        if self._tokenizer.chat_template is None:
            raise APIError(400, "the model has no chat template; use /v1/completions", param="messages")
        kwargs = kwargs or {}
        for name in kwargs:
            if name in self._reserved:
                raise APIError(400, f"chat_template_kwargs cannot set {name[:64]!r}", param="chat_template_kwargs")
        variables = {
            **self._tokenizer.special_tokens_map,
            **kwargs,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            template = self._tokenizer.get_chat_template()
            conversation = [message.as_template_has_it() for message in messages]
            text: str | int = await self._helper.call(template, conversation, variables, self._max_chars)
        except ValueError as error:  # there are several templates, and none is the default
            raise _refused(error) from error
        except LimitError as error:
            message = f"the model's chat template takes {error} for these messages; send others, or fewer"
            raise APIError(400, message, param="messages") from None
        return text


def render(template: str, conversation: list[dict[str, str]], variables: dict[str, Any], max_chars: int) -> str | int:
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
