"""Checks what a user passes with a request: prompts, which become token ids, and sampling parameters."""

import reprlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from twofold.errors import RequestError
from twofold.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELDS = ("prompt", "prompt_token_ids")
BYTES = bytes | bytearray | memoryview  # sequences of integers that are no token ids


class HasArray(Protocol):
    """Token ids as a numpy array or a PyTorch tensor on any device: [T]"""

    def __array__(self) -> NDArray[Any]: ...


Prompt = str | Sequence[int] | HasArray | dict[str, Any]


class PromptReader:
    """Tokenizes prompts and checks their ids and length. `max_num_tokens` is of prompt and answer together.

    `tokenizer` is None where prompts are token ids only.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase | None",
        vocab_size: int,
        max_num_tokens: int,
        max_model_len: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size, self.max_num_tokens, self.max_model_len = vocab_size, max_num_tokens, max_model_len

    def read(self, prompt: Prompt, truncate_prompt_tokens: int | None = None) -> tuple[str | None, list[int]]:
        """→ text if there was one, checked token ids: the last so many if that is given, for -1 all there may be.

        Raises:
            RequestError: the prompt cannot be served.
        """
        text: str | None = None
        if isinstance(prompt, dict):
            text, prompt = _fields(prompt)
        if isinstance(prompt, str):
            text, token_ids = prompt, self.encode(prompt)
        else:
            token_ids = self._checked(prompt)
        if not len(token_ids):
            raise _wrong("the prompt is empty (0 tokens); it needs at least 1")
        limit = self.max_num_tokens - 1
        if truncate_prompt_tokens is not None:
            token_ids = token_ids[-(limit if truncate_prompt_tokens == -1 else truncate_prompt_tokens) :]
        if len(token_ids) > limit:
            raise _wrong(
                f"the prompt has {len(token_ids)} tokens, more than the {limit} that max_model_len="
                f"{self.max_model_len} leaves with one of the answer; shorten it or raise max_model_len"
            )
        return text, token_ids

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """→ the tokens of a text; raises RequestError where it has none."""
        if self.tokenizer is None:
            raise _wrong("the prompt is text, but skip_tokenizer_init is set; give prompt_token_ids")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _wrong(
                f"the prompt has a lone surrogate at character {error.start}, which is no character; remove it"
            ) from None
        token_ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return token_ids

    def _checked(self, prompt: Any) -> Any:
        """Token ids that the model has: [T]. All are checked at once, since a prompt may have a million."""
        if (array := _as_array(prompt)) is not None:
            if array.ndim != 1:
                raise _wrong(f"a prompt must be one list of token ids, got an array of {array.ndim} dims")
            prompt = array
        elif not isinstance(prompt, Sequence) or isinstance(prompt, BYTES):
            raise _wrong(f"a prompt must be text or a list of token ids, got {type(prompt).__name__}")
        if not len(prompt):
            return np.empty(0, np.int64)
        try:
            token_ids: NDArray[Any] = np.asarray(prompt)
        except ValueError:  # lists within lists
            token_ids = np.empty(0)
        has_bools = not isinstance(prompt, np.ndarray) and not {bool, np.bool_}.isdisjoint(map(type, prompt))
        if token_ids.dtype.kind not in "iu" or token_ids.ndim != 1 or has_bools:
            if wrong := [t for t in prompt if isinstance(t, bool) or not isinstance(t, int | np.integer)]:
                raise _wrong(f"{reprlib.repr(wrong[0])} is not a token id; a prompt is a list of integers from 0")
            token_ids = np.asarray(prompt, object)  # integers too large for any other array
        outside = np.flatnonzero((token_ids < 0) | (token_ids >= self.vocab_size))
        if len(outside):
            raise _wrong(
                f"token id {token_ids[outside[0]]} is out of range; the model has ids 0 to {self.vocab_size - 1}"
            )
        return token_ids


def split_prompts(prompts: object) -> list[Any]:
    """One prompt, or several, as `LLM.generate` takes them → a list of prompts that are not checked yet.

    Raises:
        RequestError: it is neither.
    """
    if isinstance(prompts, str | dict):
        return [prompts]
    if (array := _as_array(prompts)) is not None:
        if array.ndim == 1 and array.dtype.kind in "biuf":
            return [array]
        prompts = array
    if not isinstance(prompts, Iterable) or isinstance(prompts, BYTES) or (array is not None and not array.ndim):
        given = type(prompts).__name__ if array is None else "an array of 0 dims"
        raise _wrong(f"prompts must be text, token ids, or a list of such prompts, got {given}")
    batch = list(prompts)
    return [batch] if batch and all(isinstance(one, int | np.integer) for one in batch) else batch


def _as_array(given: Any) -> NDArray[Any] | None:
    """An array or tensor as a numpy array, or None for anything else; raises RequestError where numpy has no such."""
    if isinstance(given, np.generic) or not hasattr(given, "__array__"):
        return None
    try:
        return np.asarray(given.cpu() if hasattr(given, "cpu") else given)
    except (TypeError, ValueError, RuntimeError):  # a tensor of bfloat16, or without data
        dtype = getattr(given, "dtype", "unknown")
        raise _wrong(f"a prompt must be text or a list of token ids, got {type(given).__name__} of {dtype}") from None


def _fields(prompt: dict[str, Any]) -> tuple[str | None, Any]:
    """→ the text that an answer shows as its prompt, and what is to be answered. A field of None is not there."""
    given = {name: value for name, value in prompt.items() if value is not None}
    if unknown := [name for name in given if name not in FIELDS]:
        raise _wrong(
            f"prompt field {reprlib.repr(unknown[0])} is not known, and would have no effect; "
            f"known are {' and '.join(FIELDS)}"
        )
    if not given:
        raise _wrong(f"a prompt needs 'prompt' or 'prompt_token_ids', got {', '.join(map(str, prompt)) or 'nothing'}")
    text = given.get("prompt")
    if not isinstance(text, str | None):
        raise _wrong(f"the prompt must be text, got {type(text).__name__}; token ids go into prompt_token_ids")
    return text, given.get("prompt_token_ids", text)


def checked_params(given: object, num_prompts: int) -> list[SamplingParams]:
    """One for each prompt, from one for all of them, one for each, or None for the defaults.

    Raises:
        RequestError: they are something else, or not as many as prompts.
    """
    if given is None:
        given = SamplingParams()
    if isinstance(given, SamplingParams):
        return [given] * num_prompts
    if not isinstance(given, list | tuple):
        raise _wrong_params("sampling_params", given)
    if len(given) != num_prompts:
        raise RequestError(
            f"{num_prompts} prompts have {len(given)} sampling_params; give one for each", field="sampling_params"
        )
    for number, one in enumerate(given):
        if not isinstance(one, SamplingParams):
            raise _wrong_params(f"sampling_params[{number}]", one)
    return list(given)


def check_extras(
    lora_request: object, priority: object, tokenization_kwargs: object = None, mm_processor_kwargs: object = None
) -> None:
    """Refuses what vLLM's methods take and Twofold does not have. What asks for nothing is taken.

    Raises:
        RequestError: there is a LoRA request, a priority, or arguments of a tokenizer or processor.
    """
    if tokenization_kwargs:
        message = "tokenization_kwargs are not supported; tokenize the prompt, and give prompt_token_ids"
        raise RequestError(message, field="tokenization_kwargs")
    if mm_processor_kwargs:
        raise RequestError("prompts are text only; leave mm_processor_kwargs out", field="mm_processor_kwargs")
    if any(one is not None for one in (lora_request if isinstance(lora_request, list) else [lora_request])):
        raise RequestError("there is no LoRA; merge the adapter into its base model", field="lora_request")
    if any(priority if isinstance(priority, list) else [priority]):
        raise RequestError("requests run in the order of their arrival; leave priority out", field="priority")


def _wrong_params(name: str, given: object) -> RequestError:
    way_out = "SamplingParams(temperature=0)"
    if isinstance(given, dict) and given and all(isinstance(key, str) and key.isidentifier() for key in given):
        way_out = f"SamplingParams({', '.join(f'{key}={reprlib.repr(value)}' for key, value in given.items())})"
    return RequestError(
        f"{name} must be SamplingParams, got {type(given).__name__}; give {way_out}", field="sampling_params"
    )


def _wrong(message: str) -> RequestError:
    return RequestError(message, field="prompt")
