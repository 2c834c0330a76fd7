"""What all changes of a model's modules have in common: find, apply, verify, undo.

No family's forward pass is written again, and names prove nothing. A transform finds the modules that it would change,
changes them in place, and compares results. If they differ, the model stays as Transformers made it: correct, but
slower or larger.

    latents        keep latents in place of heads                 same queries, keys, values and hidden states
    last layer     skip it where its output is unused             same, at two lengths
    experts        a kernel of ours for few tokens (GPU)          same output of each module of experts
    packing        one product for projections of one input       same output of each projection
    native         kernels of ours for modules like Llama's (CPU)  same output of one module of each kind
    native stack   all layers like Llama's by one kernel (CPU)     same hidden states and KV entries, in two steps
    compile        decoder layers under torch.compile             its rewriting of graphs is compared in tests
"""

import logging
from abc import ABC, abstractmethod

import torch

logger = logging.getLogger(__name__)

FLOAT32_TOLERANCE = 1e-3
TOLERANCE = 0.05  # rounding to bfloat16 changes less; the result of another token, head or expert differs by about 1


class Transform(ABC):
    """A change of a model's modules. `transform` calls the methods in their order."""

    name: str  # what messages call it

    @abstractmethod
    def find(self) -> str | None:
        """Finds the modules to change, and keeps what they compute now; → the reason if there are none."""

    @abstractmethod
    def apply(self) -> None:
        """Changes them in place."""

    @abstractmethod
    def verify(self) -> float:
        """The largest change of what must stay the same, as `probe.largest_change` measures it."""

    @abstractmethod
    def undo(self) -> None:
        """Brings them back, even if `apply` failed halfway."""


def transform(change: Transform, dtype: torch.dtype) -> bool:
    """Applies `change` to a model with weights of `dtype` → whether it was kept. If not, the model is as before."""
    is_applied = False
    try:
        if reason := change.find():
            logger.debug("transform %r has nothing to change: %s", change.name, reason)
            return False
        is_applied = True
        change.apply()
        difference = change.verify()
        if is_same(difference, dtype):
            return True
        reason = f"results would change by {difference:.1e}"
    except Exception as error:  # a family may do anything with its modules
        reason = f"it fails ({error})"
    if is_applied:
        change.undo()
    logger.info("transform %r is not used: %s", change.name, reason)
    return False


def is_same(change: float, dtype: torch.dtype) -> bool:
    """Whether results of weights of `dtype` differ by rounding only. False for NaN."""
    return change < (FLOAT32_TOLERANCE if dtype == torch.float32 else TOLERANCE)


def sample_input(num_rows: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """The same numbers at every call: [num_rows, width] between -1 and 1, of the dtype and on the device of `like`."""
    numbers = torch.arange(num_rows * width, dtype=torch.float32, device=like.device).square_().sin_()
    return numbers.view(num_rows, width).to(like.dtype)
