"""What the engine and its driver, a process of its own, say to each other of places. A *place* is a bundle of Ray's
resources and the actor that holds them: one rank runs there.

    engine ──► driver (`ray_driver.py`)        driver ──► engine
    AskPlaces                                  Waiting, Waiting, ...
                                               Given
    StartRanks                                 Started
                                               Refused, in place of any of these: its last message
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from twofold.contract import SharedFiles, StoreAddress
from twofold.errors import ConfigError

START_SECONDS = 60.0  # in which actors start and processes begin, once Ray has given places


@dataclass(frozen=True, slots=True)
class Place:
    """Where one rank runs, as its actor found it."""

    node_id: str
    host: str  # the node's address in Ray
    interface: str  # that has this address
    num_cores: int
    gpus: tuple[str, ...]  # that the bundle has, by the node's numbers
    version: str  # of Twofold


@dataclass(frozen=True, slots=True)
class AskPlaces:
    address: str | None  # of Ray's cluster; None starts one on this machine
    num_places: int
    on_gpus: bool
    fewest: int  # places that will do after `seconds`
    seconds: float


@dataclass(frozen=True, slots=True)
class Waiting:
    """Ray has no places yet."""

    reason: str


@dataclass(frozen=True, slots=True)
class Given:
    """Places in the order of ranks: those of a node follow each other, and those of the engine's node come first."""

    places: list[Place]
    node_id: str  # the engine's
    host: str


@dataclass(frozen=True, slots=True)
class StartRanks:
    address: tuple[str, int]  # where the engine takes connections
    token: bytes = b""
    num_nodes: int = 1
    environment: tuple[dict[str, str], ...] = ()  # of each rank's process, besides its node's own
    builds_kernels: bool = False

    def __repr__(self) -> str:
        return f"StartRanks({self.address}, {self.num_nodes} nodes)"  # a token is for nobody's log


@dataclass(frozen=True, slots=True)
class Started:
    """The ranks' processes have begun and are connected; `files` are each rank's own numbers."""

    files: list[SharedFiles]
    stores: list[StoreAddress | None]  # as each rank finds it; None where all ranks are on one node


@dataclass(frozen=True, slots=True)
class Refused:
    reason: str
    is_unreachable: bool = False  # there is no cluster at the address


def count_nodes(places: Sequence[Place]) -> int:
    """The number of nodes.

    Raises:
        ConfigError: some have more ranks than others.
    """
    counts = Counter(place.node_id for place in places)
    if len(set(counts.values())) == 1:
        return len(counts)
    hosts = {place.node_id: place.host for place in places}
    listed = ", ".join(f"{count} on {hosts[node_id]}" for node_id, count in counts.items())
    raise ConfigError(
        f"each node must have as many ranks as any other, and Ray gave {listed}; choose a "
        "prefill_context_parallel_size that is a multiple of what every node has free, or free as much on each",
        field="prefill_context_parallel_size",
    )


def check_versions(places: Sequence[Place], version: str) -> None:
    """Raises a ConfigError if a node has another version of Twofold than the engine."""
    for place in places:
        if place.version != version:
            raise ConfigError(
                f"all nodes must have the engine's Twofold {version}, and {place.host} has {place.version}; install "
                f"twofold=={version} there"
            )


def environments(places: Sequence[Place], num_threads: int) -> tuple[dict[str, str], ...]:
    """Of each rank's process: its threads, the way to other ranks, and its node's GPUs, which ranks of it all see."""
    is_one_node = len({place.node_id for place in places}) == 1
    made = []
    for place in places:
        gpus = [gpu for other in places if other.node_id == place.node_id for gpu in other.gpus]
        interface = "lo" if is_one_node else place.interface
        # PyTorch's store warns of every address without a name.
        environment = {"OMP_NUM_THREADS": str(num_threads), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        if interface:
            environment |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        made.append(environment)
    return tuple(made)
