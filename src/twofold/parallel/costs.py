"""Which layout a step has: by tokens or by heads, whichever costs less. NumPy only.

Costs are measured once, when an engine starts (`worker/trial.py`), and are the same on every rank. So the layout of a
step is a pure function of its scheduled batch. A run with given costs (`step_costs`) chooses as an earlier one did.
"""

import json
from dataclasses import asdict, dataclass
from typing import Self

import numpy as np

from twofold.contract import ScheduledBatch
from twofold.errors import ConfigError
from twofold.parallel.plan import HeadLayout

Points = tuple[tuple[int, float, float], ...]


@dataclass(frozen=True, slots=True)
class StepCosts:
    """For each kind of step some numbers of tokens, ascending, with milliseconds by tokens and by heads."""

    decode: Points
    prefill: Points
    num_nodes: int = 1  # that ranks were on; a prefill was one prompt, which one node has by heads

    def by_heads(self, batch: ScheduledBatch) -> bool:
        """Whether a step costs less by heads. Mixed steps and those longer than any that was measured run by tokens.

        Context counts in neither: both layouts attend to the same number of pairs on each rank, or by heads to fewer.
        """
        num_tokens, is_single = int(batch.num_scheduled_tokens.sum()), batch.num_scheduled_tokens == 1
        if is_single.all():
            return _is_less(self.decode, num_tokens, num_tokens)
        if is_single.any() or num_tokens > self.prefill[-1][0]:
            return False
        node = HeadLayout(self.num_nodes, self.num_nodes).node_of(batch)
        busiest = int(np.bincount(node, batch.num_scheduled_tokens).max())  # tokens of the node that has most by heads
        return _is_less(self.prefill, num_tokens, busiest)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `to_json` wrote.

        Raises:
            ConfigError: `text` is nothing of that kind.
        """
        try:
            given = json.loads(text)
            num_nodes = int(given.pop("num_nodes", 1))
            kinds = {kind: tuple((int(n), float(t), float(h)) for n, t, h in given.pop(kind)) for kind in KINDS}
            sizes = [[point[0] for point in points] for points in kinds.values()]
            if given or num_nodes < 1 or not all(sizes) or any(some != sorted(set(some)) for some in sizes):
                raise ValueError
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ConfigError(
                f"step_costs must be what an engine's log says after 'costs of steps', got {text[:80]!r}",
                field="step_costs",
            ) from None
        return cls(**kinds, num_nodes=num_nodes)


KINDS = ("decode", "prefill")


def _is_less(points: Points, num_tokens: int, num_tokens_by_heads: int) -> bool:
    sizes, tokens, heads = np.array(points).T
    return bool(np.interp(num_tokens_by_heads, sizes, heads) < np.interp(num_tokens, sizes, tokens))
