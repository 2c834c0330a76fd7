"""Start an engine with its ranks: on this machine, or where Ray gives them places."""

import logging
import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from twofold.config import EngineConfig, RuntimeConfig
from twofold.engine.engine import LLMEngine
from twofold.errors import ConfigError, ModelError
from twofold.executor.base import Waits
from twofold.executor.local import LocalExecutor
from twofold.executor.ray import RayExecutor, check_installed
from twofold.runtime import settle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def start_engine(config: EngineConfig) -> LLMEngine:
    """Settles the configuration, starts one process for each rank, and waits until all have loaded the model.

    Raises:
        ConfigError: this is not Linux, or Ray is asked for and not there.
        ConfigError, ModelError: the arguments, the model and the machine do not fit together.
        RankDiedError, RankFailedError: a rank did not start.
        UnavailableError: Ray gave no places for the ranks.
    """
    if sys.platform != "linux":
        raise ConfigError(
            f"models run on Linux, and this is {sys.platform}: ranks share memory without a name and end with their "
            "engine, by Linux's means; use a Linux machine or container, and twofold chat --url from here"
        )
    if config.distributed_executor_backend == "ray":
        check_installed()
    runtime, tokenizer = settle(config)
    try:
        return _start(runtime, tokenizer)
    except ModelError as error:
        if error.field != "weights" or config.weights != "auto" or runtime.weights != "sharded":
            raise
        try:
            whole = settle(replace(config, weights="replicated"))[0]
        except ModelError as refusal:
            raise ModelError(f"{error}, but {refusal}", field="weights") from None
        logger.warning("%s: so ranks do, by weights='auto'", error)
        return _start(whole, tokenizer)


def _start(runtime: RuntimeConfig, tokenizer: "PreTrainedTokenizerBase | None") -> LLMEngine:
    if runtime.engine.distributed_executor_backend == "mp":
        return LLMEngine(runtime, tokenizer, partial(LocalExecutor, runtime))
    waits = Waits()
    return LLMEngine(runtime, tokenizer, partial(RayExecutor, runtime, waits), waits)
