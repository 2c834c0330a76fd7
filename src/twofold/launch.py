"""Start an engine with ranks on this machine."""

import logging
import sys
from dataclasses import replace
from functools import partial

from twofold.config import EngineConfig
from twofold.engine.engine import LLMEngine
from twofold.errors import ConfigError, ModelError
from twofold.executor.local import LocalExecutor
from twofold.runtime import settle

logger = logging.getLogger(__name__)


def start_engine(config: EngineConfig) -> LLMEngine:
    """Settles the configuration, starts one process for each rank, and waits until all have loaded the model.

    Raises:
        ConfigError: this is not Linux.
        ConfigError, ModelError: the arguments, the model and the machine do not fit together.
        RankDiedError, RankFailedError: a rank did not start.
    """
    if sys.platform != "linux":
        raise ConfigError(
            f"models run on Linux, and this is {sys.platform}: ranks share memory without a name and end with their "
            "engine, by Linux's means; use a Linux machine or container, and twofold chat --url from here"
        )
    runtime, tokenizer = settle(config)
    try:
        return LLMEngine(runtime, tokenizer, partial(LocalExecutor, runtime))
    except ModelError as error:
        if error.field != "weights" or config.weights != "auto" or runtime.weights != "sharded":
            raise
        try:
            whole = settle(replace(config, weights="replicated"))[0]
        except ModelError as refusal:
            raise ModelError(f"{error}, but {refusal}", field="weights") from None
        logger.warning("%s: so ranks do, by weights='auto'", error)
        return LLMEngine(whole, tokenizer, partial(LocalExecutor, whole))
