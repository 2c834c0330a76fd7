"""What processors can do: published figures, and what share of them our kernels were measured to reach.

Times of a plan come of these and of nothing else. `benchmarks/plan.py` fits the shares to committed measurements, and
judges them by others.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from twofold.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Reach:
    """What is reached of the published figures, and times that are no arithmetic. Microseconds unless it says so."""

    source: str
    products: float  # share of the peak of products, by projections in a short step
    sustained: float  # the same in a long one: a GPU that computes for long is slowed down by its power limit
    expert_products: float  # the same by experts
    divided_expert_products: float  # the same by parts of experts, in steps of prompts by heads
    attention: Mapping[int, float]  # numbers of a head's keys and values together -> share of the peak
    attention_ramp: float  # keys of a query at which attention reaches half of that
    memory: float  # share of the memory's bandwidth, by reading weights and KV entries
    activations: float  # the same by reading and writing what is between products
    peer: float  # share of the link to a peer, by copies of KV entries
    fetch: float  # the same by copy engines
    sums: float  # the same by sums of partial results
    decode_layer: float  # of a layer in a step of decodes, beside what is read
    decode_sparse_layer: float  # the same of one with experts, or of latents
    prefill_layer: float  # the same in a step of prompts
    prefill_sparse_layer: float
    exchange: float  # until ranks have each other's entries of a layer, beside the bytes
    sum: float  # of partial results, beside the bytes
    long_context: float  # of a layer's attention in a step of decodes, to split it and to merge results
    request: float  # of each request of a step: sampling, detokenizing
    prompt: float  # of a prompt's way through the engine
    prompt_token: float  # the same of each of its tokens: checks, hashes, copies


@dataclass(frozen=True, slots=True)
class Processor:
    """A kind of GPU, or this machine's processor."""

    name: str
    memory: int  # bytes
    flops: float  # peak of products in bfloat16, a second
    bandwidth: float  # bytes of its memory a second
    link: float  # bytes a second to its peers in one machine, one way
    reach: Reach
    source: str = "the vendor's published figures"

    def __post_init__(self) -> None:
        for name in ("memory", "flops", "bandwidth", "link"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} of a processor must be above 0, got {getattr(self, name)}", field=name)

    def attention_share(self, numbers: int) -> float:
        """Of the peak, by attention whose heads have so many numbers in keys and values; of the nearest one known."""
        shares = self.reach.attention
        return shares[min(shares, key=lambda known: abs(known - numbers))]


# Fitted by `benchmarks/plan.py fit`; see there which measurements.
HOPPER = Reach(
    source="fitted to benchmarks/results/h200-*.json",
    products=0.78,
    sustained=0.686,
    expert_products=0.659,
    divided_expert_products=0.141,
    attention={256: 0.623, 320: 0.67},
    attention_ramp=159.0,
    memory=0.89,
    activations=0.78,
    peer=0.69,
    fetch=0.82,
    sums=0.453,
    decode_layer=34.0,
    decode_sparse_layer=77.2,
    prefill_layer=92.4,
    prefill_sparse_layer=170.2,
    exchange=25.4,
    sum=4.3,
    long_context=6.4,
    request=13.8,
    prompt=892.0,
    prompt_token=0.176,
)
LIKE_HOPPER = "its published figures times the shares that H200s reach (benchmarks/results/h200-*.json); not measured"

# Dense products in bfloat16, bandwidths of memory and of NVLink one way (PCIe where there is none), as data sheets of
# the vendor say; memory as drivers report it.
KNOWN = {
    "h100": Processor("H100 80GB", 79 * GIB, 989e12, 3.35e12, 450e9, HOPPER),
    "h200": Processor("H200", 140 * GIB, 989e12, 4.8e12, 450e9, HOPPER),
    "a100": Processor("A100 80GB", 79 * GIB, 312e12, 2.04e12, 300e9, HOPPER, LIKE_HOPPER),
    "a100-40g": Processor("A100 40GB", 39 * GIB, 312e12, 1.56e12, 300e9, HOPPER, LIKE_HOPPER),
    "l40s": Processor("L40S", 44 * GIB, 362e12, 0.864e12, 32e9, HOPPER, LIKE_HOPPER),
    "b200": Processor("B200", 178 * GIB, 2250e12, 8.0e12, 900e9, HOPPER, LIKE_HOPPER),
}


@dataclass(frozen=True, slots=True)
class Link:
    """Between nodes."""

    gbps: float  # of each node, one way
    latency: float = 50e-6  # seconds
    reach: float = field(default=0.9)  # share of `gbps` that transfers reach

    def __post_init__(self) -> None:
        if not 0 < self.gbps < 1e6:
            raise ConfigError(f"link_gbps must be above 0 and below 1e6, got {self.gbps}", field="link_gbps")
        if not 0 <= self.latency < 10:
            raise ConfigError(f"link_latency must be from 0 to 10 s, got {self.latency} s", field="link_latency")

    def seconds(self, num_bytes: float) -> float:
        return self.latency + num_bytes * 8 / (self.gbps * 1e9 * self.reach)
