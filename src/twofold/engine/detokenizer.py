"""Turn generated token ids into text, token by token, at a cost linear in the output.

The text of a token depends on its neighbours: a character's bytes can be spread over several tokens, and a leading
space can be dropped. So a short window of recent tokens is decoded again with each new token. Stop strings are searched
character by character with Knuth-Morris-Pratt automata. Their states also say how much text may begin a stop string.
"""

import re
from collections.abc import Callable
from functools import partial
from io import StringIO
from typing import TYPE_CHECKING

import numpy as np

from twofold.contract import TokenLogprobs
from twofold.outputs import Logprob, Logprobs
from twofold.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNKNOWN = "\ufffd"  # decoded from bytes that are not, or not yet, a character
_MAX_UNFINISHED = 3  # tokens that may wait for the rest of a character: it has at most 4 bytes
_CONTEXT = 6  # tokens before a new one in the window, at least
_MAX_WINDOW = 16  # a window of so many tokens is cut to its last ones
_PATIENCE = 64  # a window of so many tokens is cut even if its tokens are broken bytes or have no text


class Detokenizer:
    """The text of one answer.

    Without a tokenizer, or with `params.detokenize` off, the text stays empty. A token that ends the answer
    (end-of-sequence, `stop_token_ids`) must not be appended, unless `include_stop_str_in_output` is set.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase | None", prompt_token_ids: list[int], params: SamplingParams
    ) -> None:
        self._decode: Callable[[list[int]], str] | None = None
        if tokenizer is not None and params.detokenize:
            self._decode = partial(
                tokenizer.decode,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
                clean_up_tokenization_spaces=False,  # it could change text that was delivered already
            )
        self._stops = [_StopString(stop) for stop in params.stop or ()]
        self._include_stop = params.include_stop_str_in_output
        self._num_unstoppable = params.min_tokens  # next tokens, in which stop strings are ignored
        self._text = StringIO(newline="")
        self._length = 0  # of the text, in characters
        self._num_delivered = 0  # characters that delta() returned
        self._finished = False
        self._stop: str | None = None

        self._window = [int(i) for i in prompt_token_ids[-_MAX_WINDOW:]]
        self._num_taken = 0  # characters of the window's text that are in `text` already, or in the prompt
        self._num_whole = 0  # tokens of the window that end with a whole character
        self._prompt_end = ""
        if self._decode is not None:
            self._shrink_window()
            self._num_whole = len(self._window)
            self._prompt_end = self._decode(self._window)
            self._num_taken = len(self._prompt_end)

    @property
    def text(self) -> str:
        """All text so far, cut at a stop string. Until `finish` it ends with a whole character."""
        return self._text.getvalue()

    def append(self, token_ids: list[int]) -> str | None:
        """Adds generated tokens → the stop string that they complete, or None. Later tokens are ignored.

        Of several stop strings the first one to be complete counts; of those that end together, the longest.
        """
        for token_id in token_ids:
            if self._decode is None or self._finished:
                break
            self._window.append(token_id)
            self._take(self._advance(self._decode(self._window)), may_stop=self._num_unstoppable <= 0)
            self._num_unstoppable -= 1
        return self._stop

    def delta(self) -> str:
        """Text since the last call. An end that may be the beginning of a stop string is held back."""
        end = self._length
        if not self._finished:
            end = max(end - max((stop.num_matched for stop in self._stops), default=0), self._num_delivered)
        self._text.seek(self._num_delivered)
        delta = self._text.read(end - self._num_delivered)
        self._num_delivered = end
        return delta

    def finish(self) -> None:
        """Ends the text: adds what was held back, also an unfinished character."""
        if self._decode is not None and not self._finished:
            window_text = self._decode(self._window)
            self._resolve_prompt_end(window_text)
            self._take(window_text[self._num_taken :], may_stop=False)
        self._finished = True

    def _advance(self, window_text: str) -> str:
        """The new part of the window's text, up to its last whole character."""
        unfinished = window_text.endswith(_UNKNOWN)
        if unfinished and len(self._window) - self._num_whole <= _MAX_UNFINISHED:
            return ""
        self._resolve_prompt_end(window_text)
        end = max(len(window_text) - unfinished, self._num_taken)
        new, self._num_taken = window_text[self._num_taken : end], end
        if not unfinished:
            self._num_whole = len(self._window)
        self._shrink_window()
        return new

    def _resolve_prompt_end(self, window_text: str) -> None:
        """If the prompt ended within a character that is whole now, that character belongs to the answer."""
        if not window_text.startswith(self._prompt_end):
            self._num_taken = len(self._prompt_end.rstrip(_UNKNOWN))
        self._prompt_end = ""

    def _shrink_window(self) -> None:
        """Keeps as few of the last tokens as have a text and do not begin within a character."""
        assert self._decode is not None
        if (num_tokens := len(self._window)) < _MAX_WINDOW:
            return
        for size in range(_CONTEXT, _MAX_WINDOW):
            text = self._decode(self._window[-size:])
            if text and not text.startswith(_UNKNOWN):
                break
        else:
            if num_tokens < _PATIENCE:
                return
        del self._window[:-size]
        unfinished = text.endswith(_UNKNOWN)
        self._num_taken = len(text) - unfinished
        self._num_whole = 0 if unfinished else size

    def _take(self, new: str, may_stop: bool) -> None:
        """Adds `new` to the text. If that completes a stop string, cuts the text there and finishes."""
        self._text.seek(self._length)
        self._text.write(new)
        hits = [(end, -len(s.pattern), s.pattern) for s in self._stops if (end := s.feed(new, may_stop))]
        if not hits:
            self._length += len(new)
            return
        end, minus_size, self._stop = min(hits)
        self._length += end if self._include_stop else end + minus_size
        self._text.truncate(self._length)
        self._finished = True


class _StopString:
    """Searches a growing text for `pattern` (Knuth-Morris-Pratt)."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self._state = 0  # length of the longest prefix of the pattern that the text ends with
        self._fallback = [0, 0]  # state -> the next shorter prefix
        for char in pattern[1:]:
            self._fallback.append(self._follow(self._fallback[-1], char))

    @property
    def num_matched(self) -> int:
        """Number of last characters of the text that may begin an occurrence of the pattern."""
        return self._fallback[-1] if self._state == len(self.pattern) else self._state

    def feed(self, text: str, may_stop: bool) -> int:
        """Number of characters of `text` up to the end of the pattern; 0 if it does not end there, or may not stop."""
        for end, char in enumerate(text, 1):
            self._state = self._follow(self.num_matched, char)
            if may_stop and self._state == len(self.pattern):
                return end
        return 0

    def _follow(self, state: int, char: str) -> int:
        while state and self.pattern[state] != char:
            state = self._fallback[state]
        return state + 1 if self.pattern[state] == char else 0


def token_bytes(tokenizer: "PreTrainedTokenizerBase", token_id: int, text: str) -> bytes:
    """The bytes of a token, which may be a part of a character. `text` is the token's text by itself."""
    if _UNKNOWN in text:
        name = tokenizer.convert_ids_to_tokens(token_id)
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", name):  # SentencePiece's name for a byte
            return bytes.fromhex(byte[1])
        if all(char in _BYTES for char in name):
            return bytes(_BYTES[char] for char in name)
    return text.encode()


def _byte_names() -> dict[str, int]:
    """Byte-level BPE's character -> the byte that it stands for. A printable byte stands for itself."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTES = _byte_names()


def to_logprobs(
    logprobs: TokenLogprobs, num_logprobs: int, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> Logprobs:
    """Log-probabilities at N positions in vLLM's form: the token there first, then the `num_logprobs` most likely.

    With a tokenizer, each token's text is decoded by itself.
    """
    ids = logprobs.token_ids[:, : num_logprobs + 1]
    texts: dict[int, str | None] = dict.fromkeys(np.unique(ids).tolist())
    if tokenizer is not None:
        texts = {i: tokenizer.decode([i]) for i in texts}
    rows: Logprobs = []
    for row, values, rank in zip(ids.tolist(), logprobs.logprobs.tolist(), logprobs.ranks.tolist(), strict=True):
        entries = zip(row, values, (rank, *range(1, len(row))), strict=False)
        rows.append({i: Logprob(value, r, texts[i]) for i, value, r in entries})
    return rows
