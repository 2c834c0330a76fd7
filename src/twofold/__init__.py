"""Twofold answers long prompts fast: it splits each prompt's prefill over several ranks."""

import sys

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
from twofold.sampling_params import SamplingParams, StructuredOutputsParams

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "CompletionOutput",
    "ConfigError",
    "EngineError",
    "Logprob",
    "ModelError",
    "RankDiedError",
    "RankFailedError",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "TwofoldError",
    "UserError",
]

if TYPE_CHECKING:
    from twofold.llm import LLM
else:

    def __getattr__(name: str) -> object:
        """LLM on its first use: it brings PyTorch and Transformers, seconds that `twofold explain` can do without."""
        if name != "LLM":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from twofold.llm import LLM

        return LLM
