"""What users hand in: a prompt is read as it is meant, or refused with a line that names the field."""

from threading import Lock
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from twofold import LLM, ConfigError, EngineArgs, RequestError, SamplingParams
from twofold.config import ModelSource
from twofold.engine.prompts import PromptReader, checked_params, split_prompts
from twofold.runtime import settle


class Letters:
    """A tokenizer: a token a letter."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]


READER = PromptReader(Letters(), vocab_size=26, max_num_tokens=9, max_model_len=9)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "text", "token_ids"),
    [
        ("abc", "abc", [0, 1, 2]),
        ([0, 25], None, [0, 25]),
        ((3,), None, [3]),
        (np.array([4, 5]), None, [4, 5]),
        (torch.tensor([4, 5]), None, [4, 5]),
        ([np.int64(4), torch.tensor(5)], None, [4, 5]),
        ({"prompt_token_ids": torch.tensor([7])}, None, [7]),
        ({"prompt": "abc"}, "abc", [0, 1, 2]),
        ({"prompt_token_ids": [7]}, None, [7]),
        ({"prompt": "shown", "prompt_token_ids": [7]}, "shown", [7]),
        ({"prompt": "abc", "prompt_token_ids": None, "multi_modal_data": None}, "abc", [0, 1, 2]),
        ("abcdefgh", "abcdefgh", [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_prompts_are_read(prompt: Any, text: str | None, token_ids: list[int]) -> None:
    """vLLM's forms; a field of None is one that was not given."""
    found_text, found_ids = READER.read(prompt)
    assert (found_text, list(found_ids)) == (text, token_ids)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            {"prompt": "a", "multi_modal_data": {"image": 1}},
            "prompt field 'multi_modal_data' is not known, and would have no effect",
        ),
        (
            {"prompt_token_ids": [1], "cache_salt": "x"},
            "prompt field 'cache_salt' is not known, .* known are prompt and",
        ),
        ({"prompt_embeds": [1.0]}, "prompt field 'prompt_embeds' is not known"),
        ({}, "a prompt needs 'prompt' or 'prompt_token_ids', got nothing"),
        ([True, 5], "True is not a token id"),
        ([np.True_, 2], "True_? is not a token id"),
        (b"abc", "text or a list of token ids, got bytes"),
        (bytearray(b"abc"), "text or a list of token ids, got bytearray"),
        (np.array(3), "got an array of 0 dims"),
        (np.array([[3]]), "got an array of 2 dims"),
        (np.int64(3), "a prompt must be text or a list of token ids, got int64"),
        (torch.tensor(3), "got an array of 0 dims"),
        (torch.tensor([[3]]), "got an array of 2 dims"),
        (torch.tensor([1.5]), "1.5.* is not a token id"),
        (torch.tensor([1.5], dtype=torch.bfloat16), "a list of token ids, got Tensor of torch.bfloat16"),
        (torch.empty(2, dtype=torch.long, device="meta"), "a list of token ids, got Tensor of torch.int64"),
        (torch.tensor([True]), "True_? is not a token id"),
        ({"prompt": b"abc"}, "the prompt must be text, got bytes"),
        ({"prompt_token_ids": b"abc"}, "a prompt must be text or a list of token ids, got bytes"),
        ({b"prompt": "abc"}, "prompt field b'prompt' is not known"),
        ({"prompt": None}, "a prompt needs 'prompt' or 'prompt_token_ids', got prompt"),
        (
            {"prompt": 5, "prompt_token_ids": [1]},
            "the prompt must be text, got int; token ids go into prompt_token_ids",
        ),
        ({"prompt": [1, 2]}, "the prompt must be text, got list; token ids go into prompt_token_ids"),
        (5, "a prompt must be text or a list of token ids, got int"),
        (None, "a prompt must be text or a list of token ids, got NoneType"),
        ("", r"the prompt is empty \(0 tokens\)"),
        ([], r"the prompt is empty \(0 tokens\)"),
        ("abcdefghi", "the prompt has 9 tokens, more than the 8 that max_model_len=9 leaves"),
        ("a\ud800", "the prompt has a lone surrogate at character 1"),
        ([1, "x"], "'x' is not a token id"),
        ([True], "True is not a token id"),
        ([[1], [2, 3]], r"\[1\] is not a token id"),
        ([1.5], "1.5 is not a token id"),
        ([26], "token id 26 is out of range; the model has ids 0 to 25"),
        ([1, -1], "token id -1 is out of range"),
        ([2**80], f"token id {2**80} is out of range"),
    ],
)
def test_a_prompt_is_refused_by_name(prompt: Any, message: str) -> None:
    """Unknown keys were ignored: a question about an image was answered without the image."""
    with pytest.raises(RequestError, match=message) as caught:
        READER.read(prompt)
    assert "\n" not in str(caught.value)
    assert caught.value.field == "prompt"


@pytest.mark.parametrize(
    ("prompts", "batch"),
    [
        ("abc", ["abc"]),
        ({"prompt": "abc"}, [{"prompt": "abc"}]),
        ([1, 2], [[1, 2]]),
        ((1, 2), [[1, 2]]),
        ([np.int64(1), np.int32(2)], [[1, 2]]),
        (np.array([1, 2]), [[1, 2]]),
        (torch.tensor([1, 2]), [[1, 2]]),
        (np.array([1.5]), [[1.5]]),
        (np.array([], int), [[]]),
        (np.array(["a", "b"]), ["a", "b"]),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        ([np.array([1]), torch.tensor([2, 3]), "a", [4]], [[1], [2, 3], "a", [4]]),
        (iter(["a", "b"]), ["a", "b"]),
        ([], []),
    ],
)
def test_one_prompt_or_several(prompts: Any, batch: list[Any]) -> None:
    """The ids of an array were each taken for a prompt, and refused; those of a tensor, too."""
    found = split_prompts(prompts)
    assert [one.tolist() if isinstance(one, np.ndarray | torch.Tensor) else one for one in found] == batch


@pytest.mark.parametrize("generate", [LLM.generate, LLM.chat])
@pytest.mark.parametrize(
    "prompts",
    [None, 5, 1.5, b"abc", bytearray(b"abc"), memoryview(b"abc"), np.array(5), np.int64(5), torch.tensor(5), object()],
)
def test_what_is_no_prompt_is_one_line(generate: Any, prompts: Any) -> None:
    """`None` and integers ended in a TypeError from within, and bytes were taken for token ids."""
    with pytest.raises(RequestError, match="must be") as caught:
        generate(LLM.__new__(LLM), prompts)
    assert "\n" not in str(caught.value)
    assert caught.value.field == ("prompt" if generate is LLM.generate else "messages")


@pytest.mark.parametrize("messages", [["Hi"], [[]], "Hi", [{"role": "user", "content": "Hi"}, "Hi"], [None]])
def test_what_is_no_conversation_is_one_line(messages: Any) -> None:
    with pytest.raises(RequestError, match="a conversation must be a list of") as caught:
        LLM.__new__(LLM).chat(messages)
    assert caught.value.field == "messages"


def test_a_chat_with_a_lone_surrogate_is_one_line() -> None:
    """The tokenizer raised `TextEncodeInput must be Union[...]`."""
    llm = LLM.__new__(LLM)
    tokenizer = SimpleNamespace(
        chat_template="",
        get_chat_template=lambda *_: "",
        apply_chat_template=lambda messages, **_: messages[0]["content"],
    )
    runtime = SimpleNamespace(engine=EngineArgs("demo"))
    llm.engine = SimpleNamespace(tokenizer=tokenizer, prompts=READER, runtime=runtime)  # type: ignore[assignment]
    llm._lock = Lock()
    with pytest.raises(RequestError, match="tokenization_kwargs are not supported; tokenize the prompt"):
        llm.chat([{"role": "user", "content": "ab"}], tokenization_kwargs={"padding": True}, priority=None)
    assert llm.chat_prompt([{"role": "user", "content": "ab"}]) == {"prompt": "ab", "prompt_token_ids": [0, 1]}
    with pytest.raises(RequestError, match=r"messages\[0\]: content: it has a lone surrogate"):
        llm.chat_prompt([{"role": "user", "content": "a\ud800"}])


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(RequestError, match="skip_tokenizer_init is set; give prompt_token_ids"):
        PromptReader(None, 26, 9, 9).read("abc")


ONE, OTHER = SamplingParams(temperature=0), SamplingParams(temperature=1)


def test_parameters_are_for_all_prompts_or_one_for_each() -> None:
    assert checked_params(None, 2) == [SamplingParams()] * 2
    assert checked_params(ONE, 3) == [ONE] * 3
    assert checked_params([ONE, OTHER], 2) == [ONE, OTHER]
    assert checked_params((ONE, OTHER), 2) == [ONE, OTHER]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": 0}, r"sampling_params must be SamplingParams, got dict; give SamplingParams\(temperature=0\)"),
        ({}, r"must be SamplingParams, got dict; give SamplingParams\(temperature=0\)"),
        ("greedy", "sampling_params must be SamplingParams, got str"),
        (0.7, "sampling_params must be SamplingParams, got float"),
        (
            [ONE, {"top_p": 0.5}],
            r"sampling_params\[1\] must be SamplingParams, got dict; give SamplingParams\(top_p=0.5\)",
        ),
        ([ONE, None], r"sampling_params\[1\] must be SamplingParams, got NoneType"),
        ([ONE], "2 prompts have 1 sampling_params; give one for each"),
    ],
)
def test_what_is_no_parameters_is_one_line(given: Any, message: str) -> None:
    """A dictionary gave `'str' object has no attribute 'n'`, from deep within."""
    with pytest.raises(RequestError, match=message) as caught:
        checked_params(given, 2)
    assert "\n" not in str(caught.value)
    assert caught.value.field == "sampling_params"


def test_generate_checks_its_parameters_first() -> None:
    llm = LLM.__new__(LLM)
    llm.engine = SimpleNamespace()  # type: ignore[assignment]
    with pytest.raises(RequestError, match=r"give SamplingParams\(temperature=0\)"):
        llm.generate(["a", "b"], {"temperature": 0})  # type: ignore[arg-type]


def test_mistrals_own_library_makes_prompts_if_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards `tokenizer_mode="mistral"`: no chat template is used, tools and content parts go where they belong."""
    args = EngineArgs("demo", tokenizer_mode="mistral", config_format="mistral", load_format="mistral")
    assert args.load_format == "auto"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs mistral-common: pip install") as refusal:
        settle(args)
    assert refusal.value.field == "tokenizer_mode"

    seen: list[Any] = []
    library = SimpleNamespace(apply_chat_template=lambda messages, **given: seen.append((messages, given)) or [3, 4])
    monkeypatch.setattr(
        "transformers.tokenization_mistral_common.MistralCommonBackend.from_pretrained", lambda path, **_: library
    )
    llm = LLM.__new__(LLM)
    runtime = SimpleNamespace(engine=args, source=ModelSource("somewhere"))
    tokenizer = SimpleNamespace(chat_template=None, decode=lambda ids: f"text of {ids}")
    llm.engine, llm._lock = SimpleNamespace(tokenizer=tokenizer, runtime=runtime), Lock()  # type: ignore[assignment]
    chat = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert llm.chat_prompt(chat, tools=tools) == {"prompt": "text of [3, 4]", "prompt_token_ids": [3, 4]}
    assert seen[0][0] == [{"role": "user", "content": "Hi"}]
    assert seen[0][1]["tools"] == tools
    with pytest.raises(RequestError, match="mistral-common has no chat templates"):
        llm.chat_prompt(chat, chat_template="{{ messages }}")
    library.apply_chat_template = lambda messages, **given: messages[0]["no such field"]
    with pytest.raises(RequestError, match="mistral-common refuses the messages: 'no such field'"):
        llm.chat_prompt(chat)
