"""Puts the parts together and runs them."""

from __future__ import annotations

from .config import SimulationConfig
from .engine import Engine
from .links import Links
from .network import BYTES_PER_MS, Network
from .replica import Replica
from .result import Recorder, SimulationResult


def simulate(config: SimulationConfig) -> SimulationResult:
    """Runs every replica to its end. The same configuration gives the same result, to the last bit."""
    engine = Engine()
    recorder = Recorder(engine, config.trace)
    replicas: list[Replica] = []

    def ports_changed(rank: int) -> None:
        replicas[rank].processor.set_copying(network.busy(rank))

    links = Links(engine, config.world_size, config.exclusive_links)
    network = Network(engine, config.world_size, config.link_gbps, config.link_gbps, ports_changed)
    placement = config.placement()
    for rank in range(config.world_size):
        replicas.append(Replica(config, placement, rank, engine, links, network, recorder, replicas))
    for replica in replicas:
        replica.begin()
    engine.run()

    results = tuple(replica.result() for replica in replicas)
    makespan_ms = max(
        [result.last_copy_ms for result in results] + [step.end_ms for result in results for step in result.steps]
    )
    most_bytes = config.link_gbps * BYTES_PER_MS * makespan_ms
    received = [sum(result.bytes_by_peer) for result in results]
    sent = [sum(result.bytes_by_peer[rank] for result in results) for rank in range(config.world_size)]
    return SimulationResult(
        replicas=results,
        makespan_ms=makespan_ms,
        egress_utilisation=tuple(num_bytes / most_bytes if most_bytes else 0.0 for num_bytes in sent),
        ingress_utilisation=tuple(num_bytes / most_bytes if most_bytes else 0.0 for num_bytes in received),
        spans=tuple(recorder.spans),
    )
