"""Prompts by Mistral's own library: `--tokenizer-mode mistral`. CI has a stand-in for it, others the library."""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from running import Server, serve
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

from twofold import ConfigError, RequestError
from twofold.chat.conversation import Conversation
from twofold.chat.tools import Tools
from twofold.config import EngineConfig, ModelSource
from twofold.server import mistral
from twofold.server.config import ServerConfig, read_chat_template
from twofold.server.errors import APIError
from twofold.server.mistral import MistralPrompts

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
TOOLS = Tools([TOOL])
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [CALL]},
    {"role": "tool", "content": "7", "tool_call_id": "abcdefghi"},
]


class HereHelper:
    """Does in this process what the helper does in its own."""

    def __init__(self, module: str, function: str, seconds: float) -> None:
        self._function = getattr(mistral, function)

    async def call(self, *args: Any) -> Any:
        return self._function(*args)

    def close(self) -> None:
        pass


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the library is asked."""
    asked: list[dict[str, Any]] = []

    def apply(messages: list[dict[str, Any]], **given: Any) -> list[int]:
        asked.append({"messages": messages, **given})
        return [1, 3, 4]

    library = SimpleNamespace(apply_chat_template=apply)
    monkeypatch.setattr(mistral.MistralCommonBackend, "from_pretrained", lambda path, **_: library)
    monkeypatch.setattr(mistral, "Helper", HereHelper)
    return asked


def prompts(*words: str) -> MistralPrompts:
    tokenizer: Any = SimpleNamespace(get_vocab=lambda: dict.fromkeys(words), added_tokens_decoder={})
    mistral._chat.cache_clear()
    return MistralPrompts(tokenizer, 100, ModelSource("somewhere"))


def render(made: MistralPrompts, *messages: dict[str, Any], **given: Any) -> list[int] | int:
    return asyncio.run(made.render(Conversation(messages, **given), is_constrained=False))


def test_the_library_is_told_of_tools_and_reasoning_that_the_model_knows(seen: list[dict[str, Any]]) -> None:
    assert render(prompts("[TOOL_CALLS]"), *MESSAGES, tools=TOOLS) == [1, 3, 4]
    assert render(prompts("[TOOL_CALLS]", "[THINK]"), *MESSAGES, tools=TOOLS, effort="low") == [1, 3, 4]
    [plain, reasons] = seen
    assert plain["tools"] == [TOOL]
    assert plain["messages"][0]["content"] == "Hi"
    assert "reasoning" not in plain["messages"][1]
    assert reasons["messages"][1]["reasoning"] == "Hm."
    assert "reasoning_effort" not in reasons  # this library is too old for it
    assert prompts("[THINK]").answers.reasoning == ("[THINK]", "[/THINK]")


def test_what_is_no_conversation_for_it_is_refused(seen: list[dict[str, Any]], tmp_path: Path) -> None:
    """An image's address would be fetched, and its path read, by the server."""
    image = {"type": "image_url", "image_url": {"url": "file:///etc/hostname"}}
    with pytest.raises(RequestError, match="parts of type 'image_url' are not supported"):
        render(prompts(), {"role": "user", "content": [image]})
    with pytest.raises(APIError, match="leave chat_template_kwargs out"):
        render(prompts(), *MESSAGES, variables={"x": 1})
    assert render(prompts(), {"role": "user", "content": "x" * 101}) == 101
    assert seen == []
    with pytest.raises(ConfigError, match="mistral-common has no chat templates"):
        read_chat_template(ServerConfig(chat_template="any"), EngineConfig(model="demo", tokenizer_mode="mistral"))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model of random weights, with the words of one of Mistral's."""
    library = pytest.importorskip("mistral_common", reason="the extra `mistral` is not installed")
    folder = tmp_path_factory.mktemp("mistral")
    words = Path(library.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
    shutil.copy(words, folder / "tokenizer.model")
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=32768, num_key_value_heads=1, max_position_embeddings=2048, **small)
    MistralForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder, mistral_format=False).save_pretrained(folder)
    (folder / "tokenizer.model").rename(folder / "tokenizer.model.v3")
    with serve(folder, folder / "log", "--tokenizer-mode", "mistral", "--served-model-name", "m") as server:
        yield server


def test_a_server_makes_prompts_with_the_library(running: Server) -> None:
    from transformers.tokenization_mistral_common import MistralCommonBackend

    library = MistralCommonBackend.from_pretrained(running.log.parent.parent)
    expected = library.apply_chat_template(MESSAGES[:1], tools=[TOOL], return_dict=False)
    asked = {"messages": MESSAGES[:1], "tools": [TOOL]}
    assert running.http.post("/tokenize", json=asked).json()["tokens"] == expected
    client = running.client()
    whole = client.chat.completions.create(model="m", max_tokens=6, temperature=0, **asked)  # type: ignore[call-overload]
    pieces = client.chat.completions.create(model="m", max_tokens=6, temperature=0, stream=True, **asked)  # type: ignore[call-overload]
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.choices[0].message.content
    assert whole.usage.prompt_tokens == len(expected)
    named = {"type": "function", "function": {"name": "f"}}
    forced = client.chat.completions.create(model="m", max_tokens=64, tool_choice=named, **asked)  # type: ignore[call-overload]
    [call] = forced.choices[0].message.tool_calls
    assert call.function.name == "f"
    assert len(call.id) == 9
    replayed = {"messages": [*MESSAGES[:1], MESSAGES[1] | {"reasoning_content": None}, MESSAGES[2]], "tools": [TOOL]}
    assert running.http.post("/v1/chat/completions", json=replayed | {"max_tokens": 2}).status_code == 200
    wrong = running.http.post("/v1/chat/completions", json={"messages": MESSAGES[2:]})
    assert wrong.status_code == 400
    assert "mistral-common refuses the messages" in wrong.json()["error"]["message"]
