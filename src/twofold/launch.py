"""Start an engine with its ranks: on this machine, or where Ray gives them places."""

import gc
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from twofold.config import EngineConfig, RuntimeConfig
from twofold.engine.engine import LLMEngine
from twofold.errors import ConfigError, ModelError
from twofold.executor.base import Waits
from twofold.executor.local import LocalExecutor, RankProcesses
from twofold.executor.ray import RayExecutor, check_installed
from twofold.machine import threads_of_rank, usable_cores

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
    early = _Early(config)
    try:
        return _settle_and_start(config, early)
    finally:
        early.end()


class _Early:
    """Ranks that start at once: they import PyTorch and Transformers while this process does, on other cores."""

    def __init__(self, config: EngineConfig) -> None:
        self._processes: RankProcesses | None = None
        num_ranks = config.prefill_context_parallel_size
        if config.distributed_executor_backend == "mp" and num_ranks <= usable_cores():
            with suppress(OSError):  # said when ranks are started for good
                self._processes = RankProcesses(LocalExecutor.command, num_ranks, threads_of_rank(num_ranks))

    def take(self) -> RankProcesses | None:
        """The processes, once."""
        processes, self._processes = self._processes, None
        return processes

    def end(self) -> None:
        """Ends processes that nobody took."""
        if (processes := self.take()) is not None:
            processes.end()


def _settle_and_start(config: EngineConfig, early: _Early) -> LLMEngine:
    with no_collection():
        from twofold.runtime import settle  # it brings PyTorch and Transformers

    runtime, tokenizer = settle(config)
    try:
        return _start(runtime, tokenizer, early)
    except ModelError as error:
        if error.field != "weights" or config.weights != "auto" or runtime.weights != "sharded":
            raise
        try:
            whole = settle(replace(config, weights="replicated"))[0]
        except ModelError as refusal:
            raise ModelError(f"{error}, but {refusal}", field="weights") from None
        logger.warning("%s: so ranks do, by weights='auto'", error)
        return _start(whole, tokenizer, early)


def _start(runtime: RuntimeConfig, tokenizer: "PreTrainedTokenizerBase | None", early: _Early) -> LLMEngine:
    if runtime.engine.distributed_executor_backend == "mp":
        return LLMEngine(runtime, tokenizer, lambda timeout: LocalExecutor(runtime, timeout, early.take()))
    waits = Waits()
    return LLMEngine(runtime, tokenizer, partial(RayExecutor, runtime, waits), waits)


@contextmanager
def no_collection() -> Iterator[None]:
    """Python looks for no garbage meanwhile: among imports that took a fifth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
