"""Placement: the pure function from layers, world size and budget to owners, addresses and ring plans.

It lives in C++ (``include/sidp/placement.hpp``) and is the same object on both sides.
"""

from ._C import Placement, RingEntry, next_reader

__all__ = ["Placement", "RingEntry", "next_reader"]
