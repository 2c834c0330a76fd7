"""The prompts of conversations by Mistral's own library, not by a chat template: `tokenizer_mode="mistral"`."""

import importlib.util
from collections.abc import Sequence
from typing import Any

from twofold.config import ModelSource
from twofold.errors import ConfigError, ModelError, RequestError


def check_installed() -> None:
    """Raises ConfigError if mistral-common is not."""
    if importlib.util.find_spec("mistral_common") is None:
        raise ConfigError(
            "tokenizer_mode='mistral' needs mistral-common: pip install 'mistral-common[sentencepiece]'; "
            "or leave it out, and the model's chat template makes the prompts",
            field="tokenizer_mode",
        )


class MistralChat:
    """A tokenizer of mistral-common's: tekken.json, or tokenizer.model.v3.

    Raises:
        ModelError: the model has none.
    """

    def __init__(self, place: ModelSource) -> None:
        from transformers.tokenization_mistral_common import MistralCommonBackend

        try:
            self._backend = MistralCommonBackend.from_pretrained(place.path, **place.place)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            message = f"mistral-common cannot read a tokenizer from {place.path!r}: {reason}"
            raise ModelError(message, field="tokenizer_mode") from error

    @property
    def _knows_effort(self) -> bool:
        inner = getattr(getattr(self._backend, "tokenizer", None), "instruct_tokenizer", None)
        return bool(getattr(getattr(getattr(inner, "tokenizer", None), "version", None), "supports_model_settings", 0))

    def encode(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        reasoning_effort: str | None = None,
        **variables: Any,
    ) -> list[int]:
        """→ the token ids of a conversation; raises RequestError where mistral-common refuses it.

        reasoning_effort: left out where the model's tokenizer is too old to know it.
        """
        if reasoning_effort is not None and self._knows_effort:
            variables["reasoning_effort"] = reasoning_effort
        try:
            token_ids: list[int] = self._backend.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                return_dict=False,
                **variables,
            )
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RequestError(f"mistral-common refuses the messages: {reason}", field="messages") from error
        return token_ids
