"""Round trips of one-sided puts and signals between ranks 0 and 1, by this package's calls and by the peers'.

Each rank's bytes of the link hold what it sends, then room for what it gets, then its signal words.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import torch

from sidp_runtime import _C

from .layers import captured_call
from .link import Link
from .peers import checked, current_stream
from .rank import IDLE, RankContext, Sample, Subject, Unavailable, WrongDataError

WORD = 64  # bytes kept for signals: the peers' 64 bits, and at _OWN_WORD this package's 32
_OWN_WORD = 32
_VALUES = 1 << 20
Exchange = Callable[[int, int], None]  # (offset in the own bytes that is sent, signal value): put it, then signal
Wait = Callable[[int], None]


@functools.cache
def _one_sided(device: int) -> _C.OneSided:
    """One for all subjects and their graphs; the first is made before anything waits or is captured."""
    return _C.OneSided(device)


def sidp(context: RankContext, link: Link, size: int) -> tuple[Exchange, Wait]:
    """The kernels of the activation channel: a put that sets a flag, and the wait of one thread for such a flag."""
    if context.shares_gpu:
        raise Unavailable("the wait is a kernel that spins, on a GPU whose time the ranks share")
    puts = _one_sided(context.device.index)
    mine, theirs, stream = link.own.data_ptr(), link.remote[context.peer].data_ptr(), current_stream()
    flag = link.own.numel() - WORD + _OWN_WORD

    def send(offset: int, value: int) -> None:  # the flag's values are constants
        puts.put(theirs + size, mine + offset, size, theirs + flag, stream)

    return send, lambda value: puts.wait(mine + flag, stream)


def nvshmem_put_signal(context: RankContext, link: Link, size: int) -> tuple[Exchange, Wait]:
    """``nvshmemx_putmem_signal_on_stream`` and ``nvshmemx_signal_wait_until_on_stream``."""
    if context.shares_gpu:
        raise Unavailable("NVSHMEM ends the process at a signal wait on a GPU that ranks share without MPS")
    try:
        nvshmem: Any = import_module("nvshmem.bindings")
    except ImportError as error:
        raise Unavailable(f"nvshmem4py is not installed: {error}") from error
    base, stream = link.own.data_ptr(), current_stream()
    inbox, word = base + size, base + link.own.numel() - WORD
    put = nvshmem.Signal_op.SIGNAL_SET
    equal = nvshmem.Cmp_type.CMP_EQ

    def send(offset: int, value: int) -> None:
        nvshmem.putmem_signal_on_stream(inbox, base + offset, size, word, value, put, context.peer, stream)

    return send, lambda value: nvshmem.signal_wait_until_on_stream(word, equal, value, stream)


def memcpy_write_value(context: RankContext, link: Link, size: int) -> tuple[Exchange, Wait]:
    """``cudaMemcpyAsync`` and ``cuStreamWriteValue64`` to the peer, ``cuStreamWaitValue64`` here."""
    try:
        driver: Any = import_module("cuda.bindings.driver")
        runtime: Any = import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise Unavailable(f"cuda-bindings is not installed: {error}") from error
    mine, theirs, stream = link.own.data_ptr(), link.remote[context.peer].data_ptr(), current_stream()
    word, kind = link.own.numel() - WORD, runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice

    def send(offset: int, value: int) -> None:
        checked(runtime.cudaMemcpyAsync(theirs + size, mine + offset, size, kind, stream))
        checked(driver.cuStreamWriteValue64(stream, theirs + word, value, 0))

    return send, lambda value: checked(driver.cuStreamWaitValue64(stream, mine + word, value, 1))  # 1: equal


def round_trips(
    context: RankContext,
    link: Link,
    size: int,
    make: Callable[[RankContext, Link, int], tuple[Exchange, Wait]],
    counter: list[int],
    graph_trips: int = 0,
) -> Subject:
    """Rank 0 sends its bytes, rank 1 sends back what it got. ``counter``: values below it have been used.

    Each call is made from Python, or so many trips (two or more) are captured in a CUDA graph that is replayed.
    """
    counter[0] += _VALUES  # of this subject alone: another one that broke off on one rank does not shift them
    value = counter[0]

    def trips(values: Iterable[int], ends: tuple[Exchange, Wait] | None = None) -> None:
        send, wait = ends or make(context, link, size)  # on the current stream: in a capture it is another one
        for number in values:
            if context.rank == 0:
                send(0, number)
                wait(number)
            else:
                wait(number)
                send(size, number)

    def wrong(call: Callable[[], object]) -> WrongDataError | None:
        """To be raised once both ranks are through: the other one goes on, and waits for this one's trips."""
        if context.rank == 0:
            link.own[:size].add_(1)  # other bytes each time, as the other rank's inbox still holds the last ones
            link.own[size : 2 * size].zero_()
        call()
        context.synchronize()
        if context.rank == 0 and not torch.equal(link.own[size : 2 * size], link.own[:size]):
            return WrongDataError(f"{size} bytes did not come back as they were sent")
        return None

    def prepare() -> tuple[Sample, int]:  # both ranks do the same number of trips, as they need each other's
        if context.rank > 1:
            return IDLE
        ends = make(context, link, size)

        def trip() -> None:
            nonlocal value
            value += 1
            trips([value], ends)

        error = wrong(trip)
        if not graph_trips:
            if error:
                raise error
            return (lambda n: context.time(trip, n, warm=2)), 1000
        # A replay begins with a value that its last trip did not leave, so that its waits hold from the first one on.
        replay = captured_call(context, lambda: trips(range(1, graph_trips + 1)))
        if error:
            raise error

        def sample(n: int) -> float:
            error = wrong(replay)  # not before: had the other rank failed to capture, its trips would never come
            seconds = context.time(replay, n, warm=2) / graph_trips
            if error:
                raise error
            return seconds

        return sample, max(1, 1000 // graph_trips)

    return prepare
