"""One server with failing ranks for most tests, and one engine to compare its answers with."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from running import Server, serve
from tiny import save_tiny_model

from twofold import LLM

FLAGS = (
    "-pcp",
    "2",
    "--dtype",
    "float32",
    "--kv-cache-memory-bytes",
    "20000000",
    "--max-num-batched-tokens",
    "256",
    "--max-num-seqs",
    "64",
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tiny_model, tmp_path_factory.mktemp("server"), *FLAGS, "--served-model-name", "tiny") as running:
        yield running


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").assert_idle()


@pytest.fixture(scope="session")
def llm(tiny_model: Path) -> Iterator[LLM]:
    """The same model offline: what the server must answer."""
    with LLM(str(tiny_model), dtype="float32", kv_cache_memory_bytes=20_000_000) as offline:
        yield offline
