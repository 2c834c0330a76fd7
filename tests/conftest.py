"""What all tests share: float32, one thread, no chatter from Transformers, and the demo model, loaded once."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from twofold.models.source import demo_directory

os.environ["TWOFOLD_CPU_DTYPE"] = "float32"  # also for what tests start: most compare with Transformers, token by token


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_alone() -> Iterator[None]:
    """Tests run on machines that others use, too; and what Transformers logs is no part of a test's output."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """A test draws the same numbers alone and with others."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Makes unwritten memory NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def demo_model_directory() -> Path:
    """SmolLM2-135M-Instruct as safetensors; converted once a machine."""
    return demo_directory()


@pytest.fixture(scope="session")
def smollm2(demo_model_directory: Path) -> PreTrainedModel:
    """SmolLM2 in float32 as Transformers runs it, the reference of exactness. Tests must not change it."""
    model = AutoModelForCausalLM.from_pretrained(demo_model_directory, dtype=torch.float32)
    return model.eval().requires_grad_(False)
