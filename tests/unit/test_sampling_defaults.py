"""Default sampling parameters of a model, and values in place of those in its configuration."""

import json
from pathlib import Path
from typing import Any

import pytest

from twofold import ConfigError, ModelError
from twofold.config import EngineConfig, RuntimeConfig
from twofold.runtime import settle
from twofold.server.protocol import ChatRequest, CompletionRequest

DEFAULTS = {"temperature": 0.01, "top_k": 40, "max_new_tokens": 9}
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def folder(tmp_path: Path, demo_model_directory: Path) -> Path:
    """The demo model with a generation_config.json."""
    for file in demo_model_directory.iterdir():
        if file.name != "generation_config.json":
            (tmp_path / file.name).symlink_to(file)
    values = {**DEFAULTS, "eos_token_id": [2, 5], "do_sample": True, "top_p": None}
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    return tmp_path


def settled(folder: Path, **given: Any) -> RuntimeConfig:
    return settle(EngineConfig(model=str(folder), skip_tokenizer_init=True, **given))[0]


def test_they_come_from_the_model(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Three equal requests to a model that asks for temperature 0.01 gave "Paris" and two lines of noise."""
    runtime = settled(folder)
    assert runtime.sampling_defaults == {"temperature": 0.01, "top_k": 40, "max_tokens": 9}
    assert {2, 5} <= runtime.eos_token_ids
    assert settled(folder, generation_config="vllm").sampling_defaults == {}
    assert {2, 5} <= settled(folder, generation_config="vllm").eos_token_ids
    other = tmp_path_factory.mktemp("other")
    (other / "generation_config.json").write_text('{"min_p": 0.1}')
    given = settled(folder, generation_config=str(other), override_generation_config={"temperature": 0.5})
    assert given.sampling_defaults == {"min_p": 0.1, "temperature": 0.5}


def test_wrong_ones_are_refused_before_ranks_start(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"top_p must be .*generation_config='vllm' does without them"):
        settled(folder, override_generation_config={"top_p": 3})


def test_a_request_takes_them_for_what_it_leaves_out() -> None:
    """Guards the server: what a client asks for comes first, and max_new_tokens bounds it."""
    defaults = {"temperature": 0.01, "top_k": 40, "max_tokens": 9}
    chat = ChatRequest.model_validate({"messages": MESSAGES, "top_k": 3, "temperature": None}).sampling_params(defaults)
    assert (chat.temperature, chat.top_k, chat.max_tokens) == (0.01, 3, 9)
    body = {"messages": MESSAGES, "max_tokens": 4}
    assert ChatRequest.model_validate(body).sampling_params(defaults).max_tokens == 4
    assert ChatRequest.model_validate({"messages": MESSAGES}).sampling_params({}).max_tokens is None
    assert CompletionRequest.model_validate({"prompt": "a"}).sampling_params({}).max_tokens == 16
    assert CompletionRequest.model_validate({"prompt": "a"}).sampling_params(defaults).max_tokens == 9


def test_overrides_change_the_configuration(folder: Path) -> None:
    """Guards context extension: RoPE is scaled, and the model then has so many more positions."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
    for name in ("rope_parameters", "rope_scaling"):
        runtime = settled(folder, hf_overrides={name: yarn, "max_model_len": 32768})
        assert runtime.max_model_len == 32768
        rope = runtime.model_config.rope_parameters
        assert (rope["rope_type"], rope["factor"]) == ("yarn", 4.0)
        assert rope["rope_theta"] == settled(folder).model_config.rope_parameters["rope_theta"]
    with pytest.raises(ConfigError, match="max_model_len must be at most the model's 32768 positions"):
        settled(folder, hf_overrides={"rope_parameters": yarn}, max_model_len=32769)
    with pytest.raises(ConfigError, match="hf_overrides has 'rope', which"):
        settled(folder, hf_overrides={"rope": 1})


def test_a_revision_of_the_hub_is_read_where_it_was_downloaded(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards `revision`, `tokenizer_revision` and `download_dir`: a folder as the hub's library leaves it has two."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub = tmp_path_factory.mktemp("hub")
    model = hub / "models--owner--name"
    for number, (name, positions) in enumerate({"main": 8192, "long": 16384}.items()):
        commit = str(number) * 40
        snapshot = model / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in folder.iterdir():
            if file.name != "config.json":
                (snapshot / file.name).symlink_to(file.resolve())
        values = json.loads((folder / "config.json").read_text())
        (snapshot / "config.json").write_text(json.dumps(values | {"max_position_embeddings": positions}))
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / name).write_text(commit)
    given = {"model": "owner/name", "download_dir": str(hub)}
    runtime, tokenizer = settle(EngineConfig(**given))
    assert runtime.max_model_len == 8192
    assert tokenizer is not None
    runtime, tokenizer = settle(EngineConfig(**given, revision="long", tokenizer_revision="main"))
    assert runtime.max_model_len == 16384
    assert runtime.sampling_defaults["top_k"] == 40
    with pytest.raises(ModelError, match="cannot read the configuration of model 'owner/name'"):
        settle(EngineConfig(**given, revision="other"))
