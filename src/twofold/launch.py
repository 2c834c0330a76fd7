"""Start an engine with ranks on this machine."""

from functools import partial

from twofold.config import EngineConfig
from twofold.engine.engine import LLMEngine
from twofold.executor.local import LocalExecutor
from twofold.runtime import settle


def start_engine(config: EngineConfig) -> LLMEngine:
    """Settles the configuration, starts one process for each rank, and waits until all have loaded the model.

    Raises:
        ConfigError, ModelError: the arguments, the model and the machine do not fit together.
        RankDiedError, RankFailedError: a rank did not start.
    """
    runtime, tokenizer = settle(config)
    return LLMEngine(runtime, tokenizer, partial(LocalExecutor, runtime))
