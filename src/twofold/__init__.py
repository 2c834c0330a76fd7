"""Twofold answers long prompts fast: it splits each prompt's prefill over several ranks."""

import sys
from importlib import import_module

if sys.argv[:1] == ["-m"] and "twofold.cli.main" in sys.orig_argv and not sys.flags.safe_path:
    del sys.path[0]  # the working directory: a model that was downloaded there may come with a numpy.py

from typing import TYPE_CHECKING

from twofold.errors import (
    ConfigError,
    EngineError,
    ModelError,
    RankDiedError,
    RankFailedError,
    RequestError,
    TwofoldError,
    UserError,
)
from twofold.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from twofold.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams, StructuredOutputsParams

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncEngineArgs",
    "AsyncLLM",
    "BeamSearchParams",
    "CompletionOutput",
    "ConfigError",
    "EngineArgs",
    "EngineError",
    "LLMEngine",
    "Logprob",
    "ModelError",
    "RankDiedError",
    "RankFailedError",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
    "TwofoldError",
    "UserError",
]

if TYPE_CHECKING:
    from twofold.async_llm import AsyncLLM
    from twofold.engine_args import AsyncEngineArgs, EngineArgs
    from twofold.llm import LLM
    from twofold.llm_engine import LLMEngine
else:
    _LATER = {
        "LLM": "llm",
        "LLMEngine": "llm_engine",
        "AsyncLLM": "async_llm",
        "EngineArgs": "engine_args",
        "AsyncEngineArgs": "engine_args",
    }

    def __getattr__(name: str) -> object:
        """What brings PyTorch and Transformers, on its first use: `twofold explain` can do without, for seconds."""
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"twofold.{_LATER[name]}"), name)
