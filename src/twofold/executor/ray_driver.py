"""Ray's driver for one set of ranks, a process of its own: it asks for places, and has processes started there.

It is not the engine's process, because Ray ends a driver whose cluster is lost, and requests must outlive that.
Whatever Ray keeps for a driver ends with it: actors, and so ranks, and the placement group.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from twofold.channel import Channel
from twofold.contract import SharedFiles, StoreAddress
from twofold.executor.places import START_SECONDS, AskPlaces, Given, Place, Refused, Started, StartRanks, Waiting
from twofold.executor.ray_place import RankPlace

LATE_SECONDS = 10.0  # after its engine, at which a driver that cannot give places back ends
WAIT_SECONDS = 1  # between words to an engine that waits; in which Ray gives places that it has
STORE_BYTES = 80_000_000  # of a cluster's object store that we start: nothing of ours goes there


class Driver:
    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def run(self) -> None:
        """Serves the engine until it goes away (EOFError)."""
        ask: AskPlaces = self._channel.recv()
        if not self._join(ask):
            return
        resource = "GPU" if ask.on_gpus else "CPU"
        group = self._wait(ask, resource)
        try:
            given, actors = _take_places(group, resource)
            self._channel.send(given)
            self._channel.send(_start(given.places, actors, self._channel.recv()))
            self._channel.recv()
        finally:
            remove_placement_group(group)

    def _wait(self, ask: AskPlaces, resource: str) -> PlacementGroup:
        """Waits until Ray has places for all ranks, or, when fewer will do, for as many as it has."""
        whole, limit = _ask(ask.num_places, resource), time.monotonic() + ask.seconds
        while not whole.wait(timeout_seconds=WAIT_SECONDS):
            self._channel.send(Waiting(_shortage(ask.num_places, resource)))
            if time.monotonic() < limit:
                continue
            most = min(ask.num_places - 1, int(ray.available_resources().get(resource, 0)))
            for count in range(most, ask.fewest - 1, -1):
                group = _ask(count, resource)
                if group.wait(timeout_seconds=WAIT_SECONDS) and _is_even(group):
                    remove_placement_group(whole)
                    return group
                remove_placement_group(group)
        return whole

    def _join(self, ask: AskPlaces) -> bool:
        options: dict[str, Any] = {"address": ask.address}
        if ask.address is None:  # a cluster of our own: nothing of it is reached from other machines
            options = {
                "address": "local",
                "include_dashboard": False,
                "object_store_memory": STORE_BYTES,
            }
            if not ask.on_gpus:
                options["num_cpus"] = ask.num_places
        try:
            ray.init(logging_level="WARNING", **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = "cannot be started" if ask.address is None else f"at RAY_ADDRESS={ask.address} is out of reach"
            self._channel.send(Refused(f"a Ray cluster {where}: {_line(error)}", is_unreachable=True))
            return False
        return True


def _ask(num_places: int, resource: str) -> PlacementGroup:
    return placement_group([{resource: 1.0}] * num_places, strategy="PACK")


def _is_even(group: PlacementGroup) -> bool:
    """Whether each node has as many places as any other."""
    nodes = placement_group_table(group)["bundles_to_node_id"].values()
    return len(set(Counter(nodes).values())) == 1


def _take_places(group: PlacementGroup, resource: str) -> tuple[Given, list[Any]]:
    """→ places in the order of ranks, and their actors."""
    amounts = {"num_cpus": 0, "num_gpus": 1} if resource == "GPU" else {"num_cpus": 1}
    make, actors = ray.remote(max_restarts=0, **amounts)(RankPlace), []
    for index in range(group.bundle_count):
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
        actors.append(make.options(scheduling_strategy=strategy).remote())
    places: list[Place] = ray.get([actor.describe.remote() for actor in actors], timeout=START_SECONDS)
    node_id, host = ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()
    order = sorted(
        range(len(places)), key=lambda i: (places[i].node_id != node_id, places[i].host, places[i].node_id, i)
    )
    return Given([places[i] for i in order], node_id, host), [actors[i] for i in order]


def _start(places: Sequence[Place], actors: Sequence[Any], order: StartRanks) -> Started:
    first = {place.node_id: actor for place, actor in reversed(list(zip(places, actors, strict=True)))}
    made = [actor.share_files.remote(order.builds_kernels) for actor in first.values()]
    paths = dict(zip(first, ray.get(made, timeout=START_SECONDS), strict=True))
    store = ray.get(actors[0].listen.remote(), timeout=START_SECONDS) if order.num_nodes > 1 else None
    started: list[tuple[SharedFiles, int | None]] = ray.get(
        [
            actor.start.remote(rank, order, paths[place.node_id])
            for rank, (place, actor) in enumerate(zip(places, actors, strict=True))
        ],
        timeout=START_SECONDS,
    )
    stores = [None if store is None else StoreAddress(store[0], store[1], listener) for _, listener in started]
    return Started([files for files, _ in started], stores)


def _shortage(num_places: int, resource: str) -> str:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    listed = ", ".join(f"{node['NodeManagerAddress']} ({node['Resources'].get(resource, 0):g})" for node in nodes)
    free = ray.available_resources().get(resource, 0)
    return f"{num_places} {resource}s are needed, {free:g} are free; nodes have: {listed or 'none'}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _end_late(channel: int) -> None:
    """Ends this process some seconds after its engine, if it still waits for something then."""
    poller = select.poll()
    poller.register(channel, 0)  # only its end
    poller.poll()
    time.sleep(LATE_SECONDS)
    os._exit(1)


def main() -> None:
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the engine
    threading.Thread(target=_end_late, args=(os.dup(channel.fileno()),), daemon=True).start()
    try:
        Driver(channel).run()
    except EOFError:
        pass
    except Exception as error:
        with contextlib.suppress(OSError):
            channel.send(Refused(f"{type(error).__name__}: {_line(error)}"))
    with contextlib.suppress(Exception):
        ray.shutdown()


if __name__ == "__main__":
    main()
