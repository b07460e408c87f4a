"""Placement: the pure function from layers, world size and budget to owners, addresses and ring plans.

It lives in C++ (``include/sidp/placement.hpp``) and is the same object on both sides.
"""

from ._C import Placement, RingEntry, next_reader

__all__ = ["Placement", "RingEntry", "choose_resident_layers", "next_reader"]

_RUN, _BETWEEN = 10, 6  # layers


def choose_resident_layers(num_layers: int, count: int, world_size: int, *, cas: bool) -> list[int]:
    """Which ``count`` of ``num_layers`` layers every rank keeps, ascending.

    In WaS at even distances, so that the stream has time between any two others. Where steps may be CaS (``cas``) in
    runs of 10 and more, each behind at least 6 others, a layer of every owner in turn: replicas then find the rhythm
    in which no GPU idles (docs/simulator.md, "Rhythm"), and a ring of two slots is filled while a run is computed.
    """
    if not cas:
        return [i * num_layers // count for i in range(count)]
    others = num_layers - count
    runs = max(1, min(count // _RUN, others // _BETWEEN))
    kept: list[int] = []
    for i in range(runs):
        ahead = others * (i + 1) // runs
        if i < runs - 1:
            ahead -= ahead % world_size
        kept += (ahead + layer for layer in range(count * i // runs, count * (i + 1) // runs))
    return kept
