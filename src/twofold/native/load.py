"""Loads our kernels for CPUs into this process, once they are compiled: `if kernels: torch.ops.twofold_cpu...`."""

import logging
import time

import torch

from twofold.native.build import library

LOOK_SECONDS = 0.5  # between looks for kernels that are being compiled

logger = logging.getLogger(__name__)


class _Kernels:
    """True when the kernels are loaded."""

    def __init__(self) -> None:
        self._is_loaded, self._may_come, self._next_look = False, True, 0.0

    def __bool__(self) -> bool:
        """Loads them if they are there; looks for them from time to time."""
        if self._is_loaded or not self._may_come:
            return self._is_loaded
        if (now := time.monotonic()) >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            if library().exists():
                self._load()
        return self._is_loaded

    def _load(self) -> None:
        try:
            torch.ops.load_library(str(library()))
            self._is_loaded = True
        except (OSError, RuntimeError) as error:
            logger.warning("kernels for this CPU are not used: %s", error)
            self._may_come = False


kernels = _Kernels()
