"""Turn the messages of a chat into a prompt, by the model's chat template."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from twofold.server.errors import APIError
from twofold.server.protocol import Message


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    kwargs: Mapping[str, Any] | None,
) -> str:
    """The text of the prompt. `kwargs` are variables of the template: a request's `chat_template_kwargs`.

    Raises:
        APIError: the model has no template, or its template refuses the messages or the variables.
    """
    if tokenizer.chat_template is None:
        raise APIError(400, "the model has no chat template; use /v1/completions", param="messages")
    kwargs = kwargs or {}
    reserved = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages", "add_generation_prompt"}
    for name in kwargs:
        if name in reserved:
            raise APIError(400, f"chat_template_kwargs cannot set {name[:64]!r}", param="chat_template_kwargs")
    conversation = [message.as_template_has_it() for message in messages]
    try:
        text: str = tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=add_generation_prompt, **kwargs
        )
    except Exception as error:  # a template can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        message = f"the model's chat template refuses the messages: {reason}"
        raise APIError(400, message, param="messages") from error
    return text
