"""Twofold answers long prompts fast: it splits each prompt's prefill over several ranks."""

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
from twofold.llm import LLM
from twofold.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from twofold.sampling_params import SamplingParams

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
    "TwofoldError",
    "UserError",
]
