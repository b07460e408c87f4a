"""Placement: the pure function from layers, world size and budget to owners, addresses and ring plans.

It lives in C++ (``include/sidp/placement.hpp``) and is the same object on both sides.
"""

from ._C import Placement, RingEntry, next_reader

__all__ = ["Placement", "RingEntry", "choose_resident_layers", "next_reader"]

_RUN, _BETWEEN = 10, 6  # layers


def choose_resident_layers(num_layers: int, count: int, world_size: int, *, cas: bool) -> list[int]:
    """Which ``count`` of ``num_layers`` layers every rank keeps, ascending.

    In WaS at even distances, so that the stream has time between any two others. For steps in CaS (``cas``) in runs of
    at least 10 (or one run), behind at least 6 others each, as many of every owner: two replicas whose steps are alike
    then mostly keep the rhythm in which no GPU idles (docs/simulator.md, "Rhythm").
    """
    if not cas:
        return [i * num_layers // count for i in range(count)]
    others = num_layers - count
    rounds = others // world_size  # a layer of each owner
    runs = max(1, min(count // _RUN, rounds // -(-_BETWEEN // world_size)))
    kept: list[int] = []
    for i in range(runs):
        ahead = rounds * (i + 1) // runs * world_size if i < runs - 1 else others
        kept += (ahead + layer for layer in range(count * i // runs, count * (i + 1) // runs))
    return kept
