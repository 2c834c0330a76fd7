"""Turn the messages of a chat into a prompt by mistral-common, in a helper process: `--tokenizer-mode mistral`."""

from functools import cache
from typing import TYPE_CHECKING, Any

from transformers.tokenization_mistral_common import MistralCommonBackend  # noqa: F401  before the helper has limits

from twofold.chat.answers import answer_format
from twofold.chat.conversation import Conversation
from twofold.chat.messages import REASONING_FIELDS, for_template
from twofold.config import ModelSource
from twofold.models.mistral_chat import MistralChat
from twofold.server.errors import APIError
from twofold.server.helper import Helper, LimitError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SECONDS = 20.0  # the first call reads the tokenizer


class MistralPrompts:
    """Has the methods of `ChatTemplate`. `tokenizer` is Transformers' for the same tokens: it reads answers."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        max_chars: int,
        place: ModelSource,
        tool_call_parser: str = "auto",
        reasoning_parser: str = "auto",
    ) -> None:
        self._max_chars, self._place = max_chars, place
        self._reasons = "[THINK]" in tokenizer.get_vocab()
        tools = "mistral" if tool_call_parser == "auto" else tool_call_parser
        reasoning = ("mistral" if self._reasons else "none") if reasoning_parser == "auto" else reasoning_parser
        self.answers = answer_format(tokenizer, None, tools, reasoning)
        self._helper = Helper(__name__, "encode", MAX_SECONDS)
        self.close = self._helper.close

    async def render(self, chat: Conversation, *, is_constrained: bool) -> list[int] | int:
        """→ the token ids of the prompt; or the number of characters of its messages, if there are too many.

        Raises:
            APIError: there are variables for a template.
            RequestError: mistral-common refuses the messages or the tools.
            UnavailableError: the helper was ended.
        """
        if chat.variables:
            message = "mistral-common has no chat template; leave chat_template_kwargs out"
            raise APIError(400, message, param="chat_template_kwargs")
        messages = for_template(chat.messages, "", "string")
        num_chars = sum(len(message["content"]) for message in messages)
        if num_chars > self._max_chars:
            return num_chars
        if not self._reasons:  # it would refuse reasoning
            messages = [
                {name: value for name, value in message.items() if name not in REASONING_FIELDS} for message in messages
            ]
        how = {
            "add_generation_prompt": chat.add_generation_prompt,
            "continue_final_message": chat.continue_final_message,
            "reasoning_effort": chat.effort,
        }
        try:
            token_ids: list[int] = await self._helper.call(self._place, messages, list(chat.tools.offered), how)
        except LimitError as error:
            message = f"mistral-common takes {error} for these messages; send others, or fewer"
            raise APIError(400, message, param="messages") from None
        return token_ids


_chat = cache(MistralChat)


def encode(
    place: ModelSource, messages: list[dict[str, Any]], tools: list[dict[str, Any]], how: dict[str, Any]
) -> list[int]:
    """What `MistralPrompts.render` gives. Runs in the helper."""
    return _chat(place).encode(messages, tools, **how)
