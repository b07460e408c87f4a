"""The contract's refusals: what the state does not allow raises a typed error with numbers and breaks nothing."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from helpers.models import SyntheticModel
from helpers.processes import RankContext, run_ranks
from helpers.ranks import PROFILE, Replica, open_replica

import sidp_runtime as sidp
from sidp_runtime import Mode
from sidp_runtime.errors import (
    ClosedError,
    ConfigError,
    DeadlineError,
    ShapeError,
    UnknownNameError,
    UsageError,
)

OPS = ("mlp", "pair")
NO_STREAM = "no streams|is not a CUDA stream"


def misuse_was(context: RankContext, backend: str) -> None:
    with open_replica(context, SyntheticModel(num_layers=8), mode="was", ops=(), backend=backend) as replica:
        runtime, streamed, me = replica.runtime, replica.streamed, context.rank
        assert len(streamed) == 4
        a, b, c, d = streamed
        local = replica.pool.local_layers[0]
        for call in (lambda: runtime.fetch_layer(a), lambda: runtime.release_layer(a), runtime.end_step):
            with pytest.raises(UsageError, match="outside a step"):
                call()
        with pytest.raises(ConfigError, match="num_tokens is 0"), runtime.step(num_tokens=0):
            pass
        unused = runtime.step(num_tokens=1)
        with pytest.raises(ConfigError, match="once it has begun"):
            _ = unused.mode
        for _ in range(2):
            with runtime.step(num_tokens=1) as step:
                assert (step.mode, step.reason) == (Mode.WAS, "fixed")
                with pytest.raises(UsageError, match="do not nest"), runtime.step(num_tokens=1):
                    pass
                with pytest.raises(UsageError, match=f"out of order: next comes layer {a}") as caught:
                    runtime.fetch_layer(b)
                assert (caught.value.rank, caught.value.layer) == (me, b)
                with pytest.raises(UsageError, match="which is not held"):
                    runtime.release_layer(a)
                replica.assert_layer(a, replica.fetch(a))
                with pytest.raises(UsageError, match="out of order"):
                    runtime.fetch_layer(a)
                second = replica.fetch(b)
                with pytest.raises(UsageError, match=f"ring slot 0, which layer {a} still holds"):
                    runtime.fetch_layer(c)
                runtime.release_layer(a)
                with pytest.raises(UsageError, match="not held"):
                    runtime.release_layer(a)
                replica.assert_layer(b, second)
                replica.assert_layer(c, replica.fetch(c))
                runtime.release_layer(c)
                runtime.release_layer(b)
                # local layers: any order, any number of times, nothing to release
                for _ in range(2):
                    replica.assert_layer(local, replica.fetch(local))
                runtime.release_layer(local)
                with pytest.raises(UnknownNameError, match="was not declared"):
                    runtime.remote_compute(d, "mlp", replica.rows(1))
                replica.assert_layer(d, replica.fetch(d))
                runtime.release_layer(d)
                with pytest.raises(UsageError, match="next comes the end of the step"):
                    runtime.fetch_layer(a)
                for layer in (-1, 8):
                    with pytest.raises(UnknownNameError, match=f"layer {layer} is not one of"):
                        runtime.fetch_layer(layer)
                with pytest.raises(ConfigError, match=NO_STREAM):
                    runtime.fetch_layer(local, stream=object())
        with pytest.raises(ConfigError, match=NO_STREAM):
            runtime.step(num_tokens=1, stream="fast")
        assert runtime.stats()["steps"]["was"] == 2
        replica.step()


def test_misuse_of_was_is_refused_and_the_step_goes_on(backend: str) -> None:
    run_ranks(misuse_was, 2, backend=backend)


def skip_layers(context: RankContext, backend: str) -> None:
    with open_replica(context, SyntheticModel(num_layers=8), mode="was", ops=(), backend=backend) as replica:
        runtime, streamed = replica.runtime, replica.streamed
        for keep in range(len(streamed)):
            with pytest.raises(UsageError, match="before every streamed layer was fetched and released"):
                use(runtime, streamed[:keep], streamed[:keep])
            replica.step()
            if keep:
                with pytest.raises(UsageError, match="fetched and released"):
                    use(runtime, streamed, streamed[:-1])
                replica.step()
        assert runtime.stats()["steps_broken_off"] == 2 * len(streamed) - 1


def use(runtime: sidp.Runtime, fetched: list[int], released: list[int]) -> None:
    with runtime.step(num_tokens=1):
        for layer in fetched:
            runtime.fetch_layer(layer)
            if layer in released:
                runtime.release_layer(layer)


def test_a_step_that_skips_a_layer_is_refused_and_the_next_is_right(backend: str) -> None:
    run_ranks(skip_layers, 2, backend=backend)


def misuse_cas(context: RankContext, backend: str) -> None:
    with open_replica(context, mode="cas", backend=backend, ops=OPS, max_rows=4) as replica:
        runtime = replica.runtime
        layer, local = replica.streamed[0], replica.pool.local_layers[0]
        x = replica.rows(3)
        with pytest.raises(UsageError, match="outside a step"):
            runtime.remote_compute(layer, "mlp", x)
        wrong: list[Any] = [
            x.double(),
            x[:, :-1],
            x[0],
            x[None],
            torch.empty_like(x, device="meta"),
            replica.rows(5),
            x[:0],
        ]
        with runtime.step(num_tokens=3):
            for rows in wrong:
                with pytest.raises(ShapeError):
                    runtime.remote_compute(layer, "mlp", rows)
            with pytest.raises(ShapeError, match="was given 5 rows; a slot holds 1 to 4: raise max_rows") as caught:
                runtime.remote_compute(layer, "mlp", replica.rows(5))
            assert (caught.value.expected, caught.value.seen, caught.value.layer) == (4, 5, layer)
            with pytest.raises(UnknownNameError, match="'nothing' was not declared; the ops are: mlp, pair"):
                runtime.remote_compute(layer, "nothing", x)
            with pytest.raises(UnknownNameError, match="layer 99 has no op"):
                runtime.remote_compute(99, "mlp", x)
            with pytest.raises(UsageError, match=f"layer {local} is local"):
                runtime.remote_compute(local, "mlp", x)
            with pytest.raises(UsageError, match="in a CaS step; use remote_compute"):
                runtime.fetch_layer(layer)
            with pytest.raises(ConfigError, match=NO_STREAM):
                runtime.remote_compute(layer, "mlp", x, stream=1.0)
        replica.step()
        context.meet("stepped")
        assert runtime.stats()["served_failed"] == runtime.stats()["fallbacks"] == 0


def test_misuse_of_cas_is_refused_and_the_step_goes_on(backend: str) -> None:
    run_ranks(misuse_cas, 2, backend=backend)


def wrong_mode(context: RankContext, backend: str) -> None:
    with open_replica(context, mode="was", backend=backend) as replica:
        replica.runtime.begin_step(1)
        with pytest.raises(UsageError, match="in a WaS step; use fetch_layer"):
            replica.runtime.remote_compute(replica.streamed[0], "mlp", replica.rows(1))
        replica.runtime.end_step(broken_off=True)
        replica.step()


def test_remote_compute_in_a_was_step_is_refused(backend: str) -> None:
    run_ranks(wrong_mode, 2, backend=backend)


def after_close(context: RankContext, backend: str) -> None:
    with open_replica(context, mode="was", ops=(), backend=backend) as replica:
        replica.step()
        context.meet("stepped")
    runtime, pool, group = replica.runtime, replica.pool, replica.group
    with pytest.raises(ClosedError, match="runtime is closed"), runtime.step(num_tokens=1):
        pass
    for call in (runtime.fetch_layer, runtime.release_layer):
        with pytest.raises(ClosedError, match="runtime is closed"):
            call(0)
    for read in (pool.layer_view, pool.buffer):
        with pytest.raises(ClosedError, match="pool is closed"):
            read(pool.local_layers[0])
    with pytest.raises(ClosedError, match="pool is closed"):
        pool.publish()
    with pytest.raises(ClosedError, match="group is closed"):
        group.barrier("late")
    with pytest.raises(ClosedError, match="group is closed"):
        sidp.WeightPool(group, replica.model.layers(), pool.placement)
    assert runtime.stats()["steps"]["was"] == 1
    for closed in (runtime, pool, group):
        closed.close()  # again: nothing


def test_use_after_close_is_refused(backend: str) -> None:
    run_ranks(after_close, 2, backend=backend)


def misuse_pool(context: RankContext, backend: str) -> None:
    model = SyntheticModel()
    with context.group(backend=backend) as group:
        placement = model.placement(2)
        with pytest.raises(ConfigError, match="placement has 5 layers, 4 were given"):
            sidp.WeightPool(group, model.layers()[:4], placement)
        other = SyntheticModel(hidden=32).placement(2)
        with pytest.raises(ConfigError, match=r"layer 0 .* bytes, the placement says"):
            sidp.WeightPool(group, model.layers(), other)
        with pytest.raises(ConfigError, match="for 3 ranks, the group has 2"):
            sidp.WeightPool(group, model.layers(), model.placement(3))
        pool = sidp.WeightPool(group, model.layers(), placement)
        theirs = next(i for i in range(5) if not pool.is_local(i))
        for read in (pool.layer_view, pool.buffer):
            with pytest.raises(UsageError, match=f"layer {theirs} belongs to rank {1 - context.rank}"):
                read(theirs)
            with pytest.raises(UnknownNameError):
                read(5)
        with pytest.raises(UsageError, match=f"is not streamed to rank {context.rank}"):
            pool.ring_view(pool.local_layers[0])
        policy = sidp.ModePolicy(PROFILE)
        with pytest.raises(UsageError, match="not published"):
            sidp.Runtime(pool, policy=policy)
        pool.publish()
        with pytest.raises(UsageError, match="published already"):
            pool.publish()
        with pytest.raises(ConfigError, match="CaS needs ops"):
            sidp.Runtime(pool, policy=sidp.ModePolicy(PROFILE, fixed=Mode.CAS))
        with pytest.raises(ConfigError, match="max_rows is 0"):
            sidp.Runtime(pool, policy=policy, ops=model.ops())
        with pytest.raises(ConfigError, match="two ops have one name"):
            sidp.Runtime(pool, policy=policy, ops=model.ops() * 2, max_rows=4)
        with pytest.raises(ConfigError, match="deadline"):
            sidp.Runtime(pool, policy=policy, deadline_ms=0)
        pool.close()


def test_misuse_of_the_pool_is_refused(backend: str) -> None:
    run_ranks(misuse_pool, 2, backend=backend)


def late_lane(context: RankContext) -> None:
    """The lane needs 1.5 s a layer, the fetch waits 0.05 s."""
    with open_replica(context, mode="was", ops=(), runtime_deadline_ms=50, test_lane_delay_us=1_500_000) as replica:
        layer = replica.streamed[0]
        with pytest.raises(DeadlineError, match=f"for layer {layer} .* slot 0 is still empty") as caught:
            use(replica.runtime, [layer], [])
        error = caught.value
        assert (error.rank, error.peer, error.layer) == (context.rank, 1 - context.rank, layer)
        assert (error.expected, error.seen) == (1, 0)
        assert error.num_bytes == replica.pool.placement.layer_bytes(layer)
        assert error.waited_ms is not None
        assert 50 <= error.waited_ms < 1500
        refused(replica)


def refused(replica: Replica) -> None:
    """No step is possible once the lane's order is lost, however long one waits."""
    time.sleep(1.6)
    with pytest.raises(UsageError, match="no longer in order"), replica.runtime.step(num_tokens=1):
        pass


def test_a_fetch_past_its_deadline_names_everything_and_ends_the_runtime() -> None:
    """On the host; a GPU's fetch only enqueues, and waits for nothing but its own lane."""
    run_ranks(late_lane, 2)


def late_drain(context: RankContext) -> None:
    """As above, but the wait that runs out is the one that tidies up after a step that broke off."""
    with open_replica(
        context,
        SyntheticModel(num_layers=6),
        mode="was",
        ops=(),
        runtime_deadline_ms=50,
        test_lane_delay_us=1_500_000,
    ) as replica:
        with pytest.raises((DeadlineError, UsageError)):
            use(replica.runtime, [], [])
        refused(replica)


def test_a_drain_past_its_deadline_ends_the_runtime() -> None:
    run_ranks(late_drain, 2)


def second_runtime(context: RankContext, backend: str) -> str:
    """A second runtime on a pool whose ring an earlier one has left in mid-order: refused, or right."""
    with open_replica(
        context, SyntheticModel(num_layers=8), mode="was", ops=(), backend=backend, ring_slots=2
    ) as replica:
        runtime, streamed = replica.runtime, replica.streamed
        runtime.begin_step(1)
        runtime.fetch_layer(streamed[0])
        runtime.release_layer(streamed[0])
        replica.settled_stats(3)
        runtime.close()
        context.meet("first")
        try:
            replica.runtime = sidp.Runtime(replica.pool, policy=runtime.policy)
        except UsageError:
            return "refused"
        replica.step()
        replica.runtime.close()
        return "right"


def test_a_second_runtime_on_one_pool_never_gives_wrong_bytes(backend: str) -> None:
    assert set(run_ranks(second_runtime, 2, backend=backend)) <= {"refused", "right"}
