"""Set-up that cannot succeed: a typed error on every rank that is left, naming who and what, and nothing is kept."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import time
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.models import SyntheticModel
from helpers.processes import RankContext, RankOutcome, Ranks, run_ranks
from helpers.ranks import PROFILE, open_replica

import sidp_runtime as sidp
from sidp_runtime import _C, LayerSpec, Op, TensorSpec, _torch
from sidp_runtime.errors import CapacityError, SidpError, UnhelpfulWarning
from sidp_runtime.group import Store

# Every collective of set-up, in order.
KEYS = [
    "token",
    "pool0/manifest",
    "pool0/placement",
    "pool0/control created",
    "pool0/control mapped",
    "pool0/pool created",
    "pool0/pool mapped",
    "pool0/local memory",
    "pool0/published",
    "pool0/number of ops",
    "pool0/ops",
    "pool0/mailbox created",
    "pool0/mailbox mapped",
    "pool0/start",
]


class FatalStore:
    """A store whose user dies when it is about to take part in one collective, or just after."""

    def __init__(self, store: Store, key: str, after: bool) -> None:
        self._store = store
        self._key = key
        self._after = after
        self._seen: list[str] = []

    def _strike(self, key: str, after: bool) -> None:
        if self._after == after and key.startswith(f"sidp/default/{self._key}/"):
            os.kill(os.getpid(), signal.SIGKILL)

    def set(self, key: str, value: str | bytes, /) -> object:
        self._strike(key, after=False)
        return self._store.set(key, value)

    def get(self, key: str, /) -> bytes:
        self._strike(key, after=True)
        return self._store.get(key)

    def add(self, key: str, amount: int, /) -> int:
        return self._store.add(key, amount)

    def check(self, keys: list[str], /) -> bool:
        return self._store.check(keys)


def die_in_set_up(context: RankContext, key: str, after: bool) -> None:
    class Context(RankContext):
        def store(self) -> Store:
            store = super().store()
            return FatalStore(store, key, after) if self.rank == 1 else store

    with open_replica(Context(**vars(context)), deadline_ms=800, meet_at_end=False):
        pass


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("key", KEYS)
def test_death_in_set_up(key: str, after: bool) -> None:
    with Ranks(die_in_set_up, 3, key=key, after=after, timeout_s=20) as ranks:
        outcomes = ranks.join()
        assert outcomes[1].exit_code == -signal.SIGKILL
        last = after and key == KEYS[-1]
        for outcome in (outcomes[0], outcomes[2]):
            if last:  # set-up was complete
                assert outcome.ok, outcome.describe()
            else:
                error = raised(outcome, "DeadlineError")
                assert error["peer"] == 1
                assert error["rank"] == outcome.rank
                assert 800 <= error["waited_ms"] < 5000
                assert (error["expected"], error["seen"]) == (3, 2)
                assert "for rank(s) 1 at" in error["message"]
        _C.unlink_segments(ranks.token, 3)
        assert ranks.left_behind() == []


def raised(outcome: RankOutcome, kind: str) -> dict[str, Any]:
    assert outcome.error is not None, outcome.describe()
    assert outcome.error["type"] == kind, outcome.describe()
    return outcome.error


def join_group(context: RankContext, deadline_ms: int | None = None) -> str:
    with context.group(deadline_ms=deadline_ms) as group:
        return group.token


def test_a_rank_that_never_comes_is_named() -> None:
    with Ranks(join_group, 4, ranks=[0, 2], deadline_ms=800) as ranks:
        outcomes = ranks.join()
        for outcome in outcomes:
            error = raised(outcome, "DeadlineError")
            assert "waited" in error["message"]
            assert "for rank(s) 1, 3 at 'token'" in error["message"]
            assert (error["peer"], error["expected"], error["seen"]) == (1, 4, 2)


def test_a_rank_claimed_twice_is_refused_once() -> None:
    with Ranks(join_group, 2, ranks=[0, 1, 1]) as ranks:
        outcomes = ranks.join()
        assert outcomes[0].ok
        one, other = sorted(outcomes[1:], key=lambda outcome: outcome.ok)
        assert other.value == ranks.token
        assert raised(one, "DuplicateRankError")["rank"] == 1
        assert "give each process its own rank" in one.output


def use_other_token(context: RankContext) -> None:
    token = context.token if context.rank == 0 else "f" * 32
    sidp.Group(context.rank, 2, context.store(), token=token)


def test_ranks_with_other_tokens_are_refused() -> None:
    with Ranks(use_other_token, 2) as ranks:
        for outcome in ranks.join():
            assert "different tokens" in raised(outcome, "ConfigError")["message"]


SHAPES: dict[str, TensorSpec] = {
    "same": TensorSpec("w", (4, 8), "float32"),
    "dtype": TensorSpec("w", (4, 8), "int32"),
    "size": TensorSpec("w", (4, 8), "bfloat16"),
    "shape": TensorSpec("w", (8, 4), "float32"),
    "strides": TensorSpec("w", (4, 8), "float32", (1, 4)),
    "name": TensorSpec("v", (4, 8), "float32"),
}


def make_pool(context: RankContext, difference: str) -> None:
    odd = context.rank == 2
    spec = SHAPES[difference if odd and difference in SHAPES else "same"]
    layers = [LayerSpec(f"l{i}", (TensorSpec("a", (3,), "uint8"), spec)) for i in range(4)]
    if odd and difference == "layer name":
        layers[1] = LayerSpec("other", layers[1].tensors)
    if odd and difference == "layers":
        layers.pop()
    if odd and difference == "version":
        sidp.__version__ = "0.0.0"
    slots = 1 if odd and difference == "ring slots" else 2
    residents = [3] if odd and difference == "residents" else []
    sizes = [layer.num_bytes for layer in layers]
    placement = sidp.Placement.by_layer(sizes, 3, ring_slots=slots, resident_layers=residents)
    with context.group() as group:
        sidp.WeightPool(group, layers, placement)


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        *((name, "manifest, line 3") for name in SHAPES if name != "same"),
        ("layer name", "manifest, line 4"),
        ("layers", "manifest, line 8: 'layer 3"),
        ("version", "manifest, line 1: 'sidp_runtime "),
        ("ring slots", "placement, line 1: 'world_size 3 ring_slots"),
        ("residents", "placement, line"),
    ],
)
def test_ranks_that_disagree_about_the_pool_are_refused(difference: str, words: str) -> None:
    with Ranks(make_pool, 3, difference=difference) as ranks:
        for outcome in ranks.join():
            error = raised(outcome, "ManifestMismatchError")
            assert f"disagree about the {words}" in error["message"] or "(nothing)" in error["message"]
            assert error["peer"] == (0 if outcome.rank == 2 else 2)
            assert "start every rank with the same model" in error["message"]
        assert ranks.left_behind() == []


def make_ops(context: RankContext, difference: str) -> None:
    odd = context.rank == 1
    model = SyntheticModel(num_layers=3)
    op = model.ops()[0]
    function, name, layers = op.function, op.name, dict(op.weights)
    dtype, ops = op.dtype, []
    if odd and difference == "name":
        name = "ffn"
    if odd and difference == "layers":
        layers.pop(2)
    if odd and difference == "columns":

        def function(w: Any, x: Any) -> Any:
            return torch.nn.functional.linear(x, w["left"])

    if odd and difference == "function":

        def function(w: Any, x: Any) -> Any:
            return torch.relu(op.function(w, x))

    if not (odd and difference == "none"):
        kernel = "another" if odd and difference == "kernel" else ""
        ops = [Op(name, function, op.in_features, dtype, layers, kernel=kernel)]
    rows = 9 if odd and difference == "max_rows" else 8
    with context.group() as group:
        pool = sidp.WeightPool(group, model.layers(), model.placement(3))
        model.fill(pool)
        pool.publish()
        sidp.Runtime(pool, policy=sidp.ModePolicy(PROFILE), ops=ops, max_rows=rows).close()


@pytest.mark.parametrize("difference", ["name", "layers", "columns", "max_rows", "function", "kernel", "none"])
def test_ranks_that_disagree_about_ops_are_refused(difference: str) -> None:
    with Ranks(make_ops, 3, difference=difference) as ranks:
        for outcome in ranks.join():
            error = raised(outcome, "ManifestMismatchError")
            what = "number of ops" if difference == "none" else "ops"
            assert f"disagree about the {what}," in error["message"]
            assert error["peer"] == (0 if outcome.rank == 1 else 1)
        assert ranks.left_behind() == []


def refuse_what_does_not_help(context: RankContext) -> None:
    if context.rank == 1:
        warnings.simplefilter("error", UnhelpfulWarning)
    with open_replica(context, profile=replace(PROFILE, copy_bytes_per_s=1.0, round_trip_us=1e9), deadline_ms=20_000):
        pass


def test_a_warning_that_one_rank_refuses_ends_all_at_once() -> None:
    start = time.monotonic()
    with Ranks(refuse_what_does_not_help, 3) as ranks:
        outcomes = ranks.join()
        assert "no step of up to" in raised(outcomes[1], "UnhelpfulWarning")["message"]
        for outcome in (outcomes[0], outcomes[2]):
            assert "rank 1: no step of up to" in raised(outcome, "UnsupportedError")["message"]
        assert ranks.left_behind() == []
    assert time.monotonic() - start < 15


def fail_in_turn(context: RankContext) -> list[float]:
    with context.group(deadline_ms=20_000) as group:
        spans = group.in_turns(lambda: (time.monotonic(), time.sleep(0.05), time.monotonic()))

        def measure() -> None:
            if context.rank == 1:
                raise CapacityError("no room to measure")

        with pytest.raises(SidpError, match="no room to measure") as caught:
            group.in_turns(measure)
        assert isinstance(caught.value, CapacityError) == (context.rank == 1)
        assert caught.value.peer == (None if context.rank == 1 else 1)
        return [spans[0], spans[2]]


def test_turns_follow_each_other_and_a_failure_is_everybodys() -> None:
    start = time.monotonic()
    spans = run_ranks(fail_in_turn, 3)
    assert time.monotonic() - start < 15
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


def too_large(context: RankContext, where: str) -> int:
    """One layer of a pebibyte, at one owner or on every rank."""
    huge = LayerSpec("huge", (TensorSpec("w", (1 << 48,), "float32"),))
    layers = [LayerSpec("small", (TensorSpec("w", (64,), "float32"),)), huge]
    resident = [1] if where == "resident" else []
    placement = sidp.Placement.by_layer([layer.num_bytes for layer in layers], 2, resident_layers=resident)
    with context.group(deadline_ms=5000) as group:
        before = shutil.disk_usage("/dev/shm").used
        with pytest.raises(CapacityError, match="use more replicas, fewer ring slots or resident") as caught:
            sidp.WeightPool(group, layers, placement)
        context.meet("refused")
        assert shutil.disk_usage("/dev/shm").used - before < 64 << 20
        return -1 if caught.value.num_bytes is None else caught.value.num_bytes


@pytest.mark.parametrize("where", ["pool", "resident"])
def test_a_pool_that_does_not_fit_is_refused_on_every_rank(where: str) -> None:
    with Ranks(too_large, 2, where=where) as ranks:
        outcomes = ranks.join(stop_on_failure=True)
        ranks.check(outcomes)
    sizes = [outcome.value for outcome in outcomes]
    # the rank that could not says how much it asked for; one that could says whose words it repeats
    assert sizes == ([-1, 1 << 50] if where == "pool" else [1 << 50] * 2)


def lose_the_store(context: RankContext, deadline_ms: int) -> None:
    """Process 0 holds the store; rank 2 never comes."""
    if context.index == 0:
        hold_a_store(context)
    store = connect(context, deadline_ms)
    context.mark(f"waiting-{context.rank}")
    context.group(store=store, deadline_ms=deadline_ms)


def hold_a_store(context: RankContext) -> None:
    store, _, port = _torch.make_store_server()
    (context.folder / "port").write_text(str(port))
    context.mark("serving")
    time.sleep(60)
    store.check(["never"])


def connect(context: RankContext, deadline_ms: int) -> Store:
    context.wait_for("serving")
    return _torch.connect_store("127.0.0.1", int((context.folder / "port").read_text()), deadline_ms)


@pytest.mark.parametrize(
    ("number", "deadline_ms"), [(signal.SIGKILL, 60_000), (signal.SIGSTOP, 800)], ids=["killed", "stopped"]
)
def test_a_lost_store_ends_set_up(number: signal.Signals, deadline_ms: int) -> None:
    """A dead store is noticed at once, a stopped one within the deadline."""
    with Ranks(lose_the_store, 3, ranks=[9, 0, 1], deadline_ms=deadline_ms) as ranks:
        for rank in (0, 1):
            ranks.wait_for(f"waiting-{rank}")
        time.sleep(0.1)
        ranks.signal(0, number)
        outcomes = ranks.join(20, stop_on_failure=True)[1:]
        for outcome in outcomes:
            error = raised(outcome, "PeerDeadError")
            assert f"rank {outcome.rank} lost the group's store at 'token'" in error["message"]


def step_without_a_store(context: RankContext) -> None:
    if context.index == 0:
        hold_a_store(context)

    class Context(RankContext):
        def store(self) -> Store:
            return connect(self, 5000)

    with open_replica(Context(**vars(context)), deadline_ms=5000) as replica:
        context.mark(f"set-up-{context.rank}")
        context.wait_for("killed")
        for seed in range(5):
            replica.step(seed=seed)


def test_steps_need_no_store() -> None:
    with Ranks(step_without_a_store, 2, ranks=[9, 0, 1]) as ranks:
        for rank in (0, 1):
            ranks.wait_for(f"set-up-{rank}")
        ranks.signal(0, signal.SIGKILL)
        ranks.mark("killed")
        ranks.check(ranks.join()[1:])
