"""Text that grows token by token is the text of all tokens, whatever the tokens cut apart."""

import functools
import random
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from twofold.contract import TokenLogprobs
from twofold.engine.detokenizer import Detokenizer, to_logprobs, token_bytes
from twofold.outputs import Logprob
from twofold.sampling_params import SamplingParams

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return x",
    "你好，世界。",
    "🙂 smile 🙃 naïve",
]
KEPT = SamplingParams(skip_special_tokens=False)


@functools.cache
def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level BPE of some 330 tokens, in which Chinese and emoji take several tokens a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@functools.cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """As SentencePiece does it: a mark for spaces, the first space dropped, and bytes for unknown characters."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz.,"]
    tokenizer = Tokenizer(
        models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def feed(detokenizer: Detokenizer, token_ids: list[int], sizes: list[int]) -> list[str]:
    """Append all tokens in groups of `sizes`, cyclically; the deltas, the last one after `finish`."""
    deltas, at, i = [], 0, 0
    while at < len(token_ids):
        detokenizer.append(token_ids[at : at + sizes[i % len(sizes)]])
        at, i = at + sizes[i % len(sizes)], i + 1
        deltas.append(detokenizer.delta())
        assert "".join(deltas) == detokenizer.text[: sum(map(len, deltas))]
    detokenizer.finish()
    return [*deltas, detokenizer.delta()]


tokens = st.lists(st.integers(0, 330), max_size=120)
groups = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(tokens, groups, st.booleans())
@example(list(range(256)) * 2, [1], True)
def test_any_tokens_give_the_text_of_all(token_ids: list[int], sizes: list[int], skip: bool) -> None:
    """Guards the window: even bytes that are no UTF-8, and special tokens, come out as decoded at once."""
    detokenizer = Detokenizer(byte_level(), [], SamplingParams(skip_special_tokens=skip))
    deltas = feed(detokenizer, token_ids, sizes)
    assert detokenizer.text == byte_level().decode(token_ids, skip_special_tokens=skip)
    assert "".join(deltas) == detokenizer.text


words = st.text(st.sampled_from("abc 你好世é🙂🙃.,\n"), max_size=80)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@settings(max_examples=200, deadline=None)
@given(prompt=words, answer=words, sizes=groups)
@example("世世世🙂🙂", "\n", [1])
def test_real_text_after_a_prompt(
    make: "functools._lru_cache_wrapper[PreTrainedTokenizerFast]", prompt: str, answer: str, sizes: list[int]
) -> None:
    """Guards both families of tokenizers: spaces after the prompt stay, characters appear whole or not yet."""
    tokenizer = make()
    ids = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
    cut = min(len(tokenizer(prompt, add_special_tokens=False)["input_ids"]), len(ids))
    before, whole = tokenizer.decode(ids[:cut]), tokenizer.decode(ids)
    if before.endswith("\ufffd"):
        return  # the prompt's last character was cut: another test's matter
    detokenizer = Detokenizer(tokenizer, ids[:cut], KEPT)
    deltas = feed(detokenizer, ids[cut:], sizes)
    assert before + detokenizer.text == whole
    assert not any("\ufffd" in delta for delta in deltas)


@pytest.mark.parametrize("character", ["🙂", "界", "é", "𓀀"])
def test_a_character_appears_when_its_last_byte_does(character: str) -> None:
    """Guards streams against replacement characters: emoji and Chinese are spread over tokens."""
    ids = [
        byte_level().convert_tokens_to_ids(c) for c in pre_tokenizers.ByteLevel(False).pre_tokenize_str(character)[0][0]
    ]
    assert len(ids) == len(character.encode())
    detokenizer = Detokenizer(byte_level(), [], KEPT)
    for i in ids[:-1]:
        detokenizer.append([i])
        assert (detokenizer.text, detokenizer.delta()) == ("", "")
    detokenizer.append(ids[-1:])
    assert (detokenizer.text, detokenizer.delta()) == (character, character)


def test_a_character_that_the_prompt_began() -> None:
    """Guards prompts cut within a character: the answer that completes it owns it; one that does not, does not."""
    ids = byte_level()("𓀀", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    for prompt in (ids[:-1], [*byte_level()("some text that is long enough to fill a window")["input_ids"], *ids[:-1]]):
        completed = Detokenizer(byte_level(), prompt, KEPT)
        completed.append(ids[-1:])
        assert completed.text == "𓀀"
        left = Detokenizer(byte_level(), prompt, KEPT)
        left.append(byte_level()("a")["input_ids"])
        assert left.text == "a"


def test_an_unfinished_character_is_released_at_the_end() -> None:
    """Guards the end of a stream cut by max_tokens: nothing is lost silently."""
    ids = byte_level()("ab𓀀")["input_ids"][:-1]
    detokenizer = Detokenizer(byte_level(), [], KEPT)
    assert feed(detokenizer, ids, [1])[-1] == "\ufffd"
    assert detokenizer.text == byte_level().decode(ids)


def first_stop(text: str, stops: list[str]) -> tuple[int, int, str] | None:
    """(end, start, stop) of the stop string that is complete first, by brute force."""
    ends = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
    return min(ends) if ends else None


letters = st.text("ab🙂", min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(st.text("ab🙂", max_size=40), st.lists(letters, min_size=1, max_size=3, unique=True), groups, st.booleans())
def test_stop_strings(text: str, stops: list[str], sizes: list[int], include: bool) -> None:
    """Guards stop strings however tokens cut them: found, removed, and never delivered in part."""
    ids = byte_level()(text)["input_ids"]
    params = SamplingParams(stop=stops, include_stop_str_in_output=include)
    detokenizer = Detokenizer(byte_level(), [], params)
    delivered, stopped, at, i = "", None, 0, 0
    while at < len(ids) and stopped is None:
        stopped = detokenizer.append(ids[at : at + sizes[i % len(sizes)]])
        at, i = at + sizes[i % len(sizes)], i + 1
        delivered += detokenizer.delta()
        if stopped is None:  # what is held back is exactly what a stop string may begin with
            held = detokenizer.text[len(delivered) :]
            beginnings = [n for s in stops for n in range(1, len(s)) if detokenizer.text.endswith(s[:n])]
            assert len(held) == max(beginnings, default=0)
    detokenizer.finish()
    delivered += detokenizer.delta()
    expected = first_stop(text, stops)
    assert stopped == (expected[2] if expected else None)
    assert detokenizer.text == (text[: expected[0] if include else expected[1]] if expected else text)
    assert delivered == detokenizer.text


def test_tokens_after_a_stop_string_are_ignored() -> None:
    """Guards a step that was already under way when the sequence stopped."""
    detokenizer = Detokenizer(byte_level(), [], SamplingParams(stop="b"))
    assert detokenizer.append(byte_level()("ab")["input_ids"]) == "b"
    assert detokenizer.append(byte_level()("cd")["input_ids"]) == "b"
    detokenizer.finish()
    assert (detokenizer.text, detokenizer.delta()) == ("a", "a")


@pytest.mark.parametrize("size", [1, 2, 8])
def test_min_tokens_comes_before_stop_strings(size: int) -> None:
    """Guards vLLM's meaning: a stop string within the first min_tokens tokens does not stop, the next one does."""
    ids = [i for c in "bxbyb" for i in byte_level()(c)["input_ids"]]
    detokenizer = Detokenizer(byte_level(), [], SamplingParams(stop="b", min_tokens=3))
    stopped = [detokenizer.append(ids[at : at + size]) for at in range(0, 5, size)][-1]
    assert stopped == "b"
    assert detokenizer.text == "bxby"


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_no_text(with_tokenizer: bool) -> None:
    """Guards engines without a tokenizer and requests that want ids alone."""
    detokenizer = Detokenizer(
        byte_level() if with_tokenizer else None, [1], SamplingParams(detokenize=not with_tokenizer)
    )
    assert detokenizer.append([2, 3]) is None
    detokenizer.finish()
    assert (detokenizer.text, detokenizer.delta()) == ("", "")


@pytest.mark.parametrize("kind", ["text", "bytes", "special"])
def test_the_window_is_bounded(kind: str) -> None:
    """Guards linear cost: no run of tokens, of broken bytes or of skipped special tokens makes the window grow."""
    tokenizer = byte_level()
    broken = tokenizer.convert_tokens_to_ids("Ģ")  # byte 0x80, which begins no character
    run = {"text": [5, 6, 7], "bytes": [broken], "special": [tokenizer.eos_token_id]}[kind]
    detokenizer = Detokenizer(tokenizer, [], SamplingParams(stop="zzz"))
    for _ in range(300):
        detokenizer.append(run)
        assert len(detokenizer._window) <= 64
    detokenizer.finish()
    assert detokenizer.text == tokenizer.decode(run * 300, skip_special_tokens=True)


def test_cost_is_linear() -> None:
    """Guards against rescans: ten times the tokens may take at most some twenty times as long."""
    ids = byte_level()("The quick brown fox. 你好 ")["input_ids"]
    stops = ["\n\nUser:", "a" * 2000]

    def seconds(num_tokens: int) -> float:
        draw = random.Random(0)
        detokenizer = Detokenizer(byte_level(), ids, SamplingParams(stop=stops))
        begin = time.perf_counter()
        for _ in range(num_tokens):
            detokenizer.append([draw.choice(ids)])
            detokenizer.delta()
        return time.perf_counter() - begin

    seconds(100)
    assert seconds(10_000) < 20 * min(seconds(1000) for _ in range(3))


def test_logprobs_in_vllms_form() -> None:
    """Guards rows narrowed to what a request asked for, the sampled token's rank, and decoded tokens."""
    a, b, c = (byte_level()(x)["input_ids"][0] for x in "abc")
    ids = np.array([[c, a, b], [a, a, b]], np.int32)
    values = np.array([[-3, -0.5, -1], [-0.25, -0.25, -2]], np.float32)
    rows = TokenLogprobs(ids, values, np.array([3, 1], np.int32))
    assert to_logprobs(rows, 1, byte_level()) == [
        {c: Logprob(-3.0, 3, "c"), a: Logprob(-0.5, 1, "a")},
        {a: Logprob(-0.25, 1, "a")},
    ]
    assert to_logprobs(rows, 0) == [{c: Logprob(-3.0, 3)}, {a: Logprob(-0.25, 1)}]
    assert list(to_logprobs(rows, 2)[0]) == [c, a, b]


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_a_token_has_its_bytes(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    """Guards parts of characters: together the bytes of their tokens are the character's. Of both kinds of names."""
    tokenizer = make()
    for text in ("🙂", "你", "é", "a"):
        tokens = tokenizer.encode(text)
        parts = [token_bytes(tokenizer, token, tokenizer.decode([token])) for token in tokens]
        assert b"".join(parts).decode().strip() == text
