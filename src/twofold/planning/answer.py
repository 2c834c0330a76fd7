"""All that `twofold plan` says of a model on some GPUs, as one record. No PyTorch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from twofold.planning.processors import Link, Processor
from twofold.planning.room import Room, Wish, choose, longest, ranks_needed
from twofold.planning.shape import ModelShape
from twofold.planning.times import Setup, TimeModel

EXACT = "the model's configuration"
ESTIMATED = "an estimate of the largest step; ranks measure it when they start"


@dataclass(frozen=True, slots=True)
class Machines:
    """What the model would run on."""

    memory: int  # bytes of each GPU
    num_gpus: int  # of each node
    num_nodes: int = 1
    link: Link | None = None  # between nodes
    utilization: float = 0.9  # share of the memory that may be used
    processor: Processor | None = None  # None: no times

    @property
    def usable(self) -> int:
        return int(self.memory * self.utilization)


@dataclass(frozen=True, slots=True)
class Table:
    """Which times to say."""

    lens: Sequence[int]
    context: int
    batches: Sequence[int] = (1, 8, 32)


def answer(
    shape: ModelShape, machines: Machines, wish: Wish, table: Table, layout: str, policy: str = "dual_chunk_swap"
) -> dict[str, Any]:
    """Holdings, what fits, times, and where each figure comes from. Weights and cache are shared within a node."""
    room = choose(shape, machines.usable, machines.num_gpus, wish)
    found = _of_room(room, wish) | _ways_out(shape, machines, room, wish)
    sources = {"weights, KV entries": EXACT, "memory to compute in": ESTIMATED}
    processor = machines.processor
    if processor is not None:
        setup = Setup(
            num_ranks=machines.num_gpus * machines.num_nodes,
            num_nodes=machines.num_nodes,
            link=machines.link,
            shards_weights=room.shards_weights,
            shards_cache=room.shards_cache,
            step_layout=layout,
            policy=policy,
            max_num_batched_tokens=wish.num_batched_tokens(machines.num_gpus * machines.num_nodes),
        )
        found |= _times(shape, processor, setup, table)
        sources |= {"times": f"{processor.name}, {processor.source}", "shares and overheads": processor.reach.source}
    if machines.link is not None:
        sources["link"] = f"{machines.link.gbps:g} Gbit/s and {machines.link.latency * 1e6:g} us, as given"
    return found | {"sources": sources}


def _of_room(room: Room, wish: Wish) -> dict[str, Any]:
    return {
        "fits": room.fits,
        "weights": "sharded" if room.shards_weights else "replicated",
        "kv_cache": "sharded" if room.shards_cache else "replicated",
        "bytes of each rank": {
            "may be used": room.usable, "weights": room.weights, "fetched layers": room.buffers,
            "fetched KV entries": room.workspace, "computing": room.beside, "KV cache": room.cache,
        },
        "tokens that fit": room.num_tokens,
        "requests of max_model_len": round(room.num_tokens / wish.max_model_len, 2),
    }  # fmt: skip


def _ways_out(shape: ModelShape, machines: Machines, room: Room, wish: Wish) -> dict[str, Any]:
    """What a longer context would take; if not even one request fits, how many GPUs of a node would do."""
    most = longest(shape, machines.usable, machines.num_gpus, replace(wish, weights="auto", kv_cache="auto"))
    found: dict[str, Any] = {
        "longest context": most
        and {
            "tokens": most.needed_tokens,
            "weights": "sharded" if most.shards_weights else "replicated",
            "kv_cache": "sharded" if most.shards_cache else "replicated",
        },
        "bytes of each rank for 1000 tokens": round(1000 * shape.entry_on(room.num_ranks, room.shards_cache)),
    }
    twice = ranks_needed(shape, machines.usable, replace(wish, max_model_len=2 * max(room.num_tokens, 1)))
    found["GPUs for twice as many tokens"] = twice and twice.num_ranks
    if not room.fits:
        enough = ranks_needed(shape, machines.usable, wish)
        found["GPUs that would do"] = enough and enough.num_ranks
    return found


def _times(shape: ModelShape, processor: Processor, setup: Setup, table: Table) -> dict[str, Any]:
    model, alone = TimeModel(shape, processor, setup), None
    if setup.num_nodes > 1:
        one_node = replace(setup, num_ranks=setup.ranks_per_node, num_nodes=1, link=None)
        alone = TimeModel(shape, processor, one_node)
    ttft = []
    for length in table.lens:
        seconds = model.ttft(length)
        row = {"prompt": length, "ms": round(seconds * 1e3, 3)}
        if alone is not None:
            row["efficiency"] = round(alone.ttft(length) / (setup.num_nodes * seconds), 4)
        last = model.steps(length)[-1]
        parts = asdict(model.prefill(last[0], last[1] - last[0]))
        row["last step ms"] = {name: round(value * 1e3, 3) for name, value in parts.items()}  # type: ignore[assignment]
        ttft.append(row)
    tokens = [
        {"batch": batch, "context": table.context, "ms": round(model.token(batch, table.context) * 1e3, 3)}
        for batch in table.batches
    ]
    return {"time to first token": ttft, "from token to token": tokens}
