"""One traced replica, forked from a server that has this imported: importing must start no thread."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .. import _torch
from .._C import Mode
from ..errors import DeadlineError, SidpError
from ..group import Group
from ..job import protocol
from ..manifest import LayerSpec, TensorSpec
from ..ops import Op
from ..placement import Placement
from ..policy import ModePolicy
from ..runtime import Runtime
from ..weight_pool import WeightPool

_MODES = {"auto": None, "was": Mode.WAS, "cas": Mode.CAS}
_COUNTERS = ("bytes_by_peer", "requests_by_peer", "served_by_peer", "steps", "request_rows", "request_bytes", "fetches")

#: Makes so many steps.
Steps = Callable[[int], None]


def run_trace(settings: dict[str, Any], connection: Connection) -> None:
    """Target of the process; ``settings`` by ``TraceConfig.check`` and ``ReplicaSet``. Writes ``folder/RANK.json``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher decides what becomes of its replicas
    try:
        stats = _trace(settings)
        protocol.send(connection, "stats", stats=stats, memory={})
        protocol.receive(connection, protocol.FROM_LAUNCHER)
    except (EOFError, ConnectionError):
        sys.exit(3)  # the launcher is gone
    except Exception as error:  # whatever it is, the launcher must hear it
        protocol.send(connection, "error", error=type(error).__name__, message=str(error))
        sys.exit(1)


def _trace(settings: dict[str, Any]) -> dict[str, Any]:
    rank, devices = settings["rank"], settings["devices"]
    store = _torch.connect_store(settings["store_host"], settings["store_port"], settings["deadline_ms"])
    with ExitStack() as closed:
        group = closed.enter_context(
            Group(
                rank,
                settings["world_size"],
                store,
                backend=settings["backend"],
                token=settings["token"],
                deadline_ms=settings["deadline_ms"],
                device=devices[rank % len(devices)],
            )
        )
        runtime, make_steps = (_synthetic if settings["shape"] else _model)(settings, group, closed)
        make_steps(1)  # maps pages and loads kernels
        _finish(runtime, group)
        group.all_gather("trace/warm", b"")  # or a service of a late warm-up were in the trace of an early one
        # Everybody traces before anybody asks, and until nobody asks any more: each request has its service.
        before = runtime.stats()
        with runtime.tracing(num_events=settings["num_events"], nvtx=settings["nvtx"]) as tracing:
            group.all_gather("trace/started", b"")
            make_steps(settings["steps"])
            _finish(runtime, group)
            group.all_gather("trace/stepped", b"")
        after = runtime.stats()
        part = {**tracing.part, "stats": {key: _more(after[key], before[key]) for key in _COUNTERS}}
        (Path(settings["folder"]) / f"{rank}.json").write_text(json.dumps(part), encoding="utf-8")
        return {"steps": settings["steps"]}


def _finish(runtime: Runtime, group: Group) -> None:
    """Until the streams are idle and the lane has refilled the ring, so that the trace has what the counters have."""
    if group.device is not None:
        from .. import _torch_gpu

        _torch_gpu.synchronize(group.device)
    runtime.check()
    placement = runtime.pool.placement
    head = min(placement.num_slots(group.rank), len(placement.streamed_layers(group.rank)))
    limit = time.monotonic() + group.deadline_ms / 1000
    while (stats := runtime.stats())["copies"] != stats["fetches"] + head:
        if time.monotonic() > limit:
            raise DeadlineError(
                f"the lane made {stats['copies']} copies for {stats['fetches']} fetches", rank=group.rank
            )
        time.sleep(0.001)


def _more(after: Any, before: Any) -> Any:
    if isinstance(after, dict):
        return {key: _more(after[key], before[key]) for key in after}
    if isinstance(after, list):
        return [_more(a, b) for a, b in zip(after, before, strict=True)]
    return after - before


def _synthetic(settings: dict[str, Any], group: Group, closed: ExitStack) -> tuple[Runtime, Steps]:
    """Layers that are an MLP each, with random weights."""
    shape, tokens = settings["shape"], settings["tokens"]
    hidden, inner, dtype = shape["hidden"], shape["inner"], shape["dtype"]
    tensors = (TensorSpec("up", (inner, hidden), dtype), TensorSpec("down", (hidden, inner), dtype))
    layers = [LayerSpec(f"layers.{i}", tensors) for i in range(shape["layers"])]
    placement = Placement.by_layer([layer.num_bytes for layer in layers], group.world_size)
    pool = closed.enter_context(WeightPool(group, layers, placement))
    for layer in pool.local_layers:
        for tensor in pool.layer_view(layer).values():
            tensor.normal_(std=tensor.shape[-1] ** -0.5)
    if group.device is not None:
        from .. import _torch_gpu

        _torch_gpu.synchronize(group.device)
    pool.publish()

    def mlp(w: Any, x: Any) -> Any:
        return (x @ w["up"].t()).relu() @ w["down"].t()

    op = Op("mlp", mlp, hidden, dtype, {i: {"up": "up", "down": "down"} for i in range(len(layers))})
    runtime = closed.enter_context(
        Runtime(
            pool,
            policy=ModePolicy.calibrated_in_turns(pool, fixed=_MODES[settings["mode"]]),
            ops=[op] if group.world_size > 1 else [],
            max_rows=tokens,
            row_buckets=None if group.device is None or group.world_size == 1 else [tokens],
        )
    )
    x0 = pool.ring_view(0)["up"] if not pool.is_local(0) else pool.layer_view(0)["up"]
    x0 = x0.new_ones(tokens, hidden)

    def make_steps(count: int) -> None:
        for _ in range(count):
            x: Any = x0
            with runtime.step(num_tokens=tokens) as step:
                for layer in range(len(layers)):
                    if step.mode == Mode.CAS and not pool.is_local(layer):
                        x = runtime.remote_compute(layer, "mlp", x)
                    else:
                        x = mlp(runtime.fetch_layer(layer), x)
                        runtime.release_layer(layer)

    return runtime, make_steps


def _model(settings: dict[str, Any], group: Group, closed: ExitStack) -> tuple[Runtime, Steps]:
    """A transformers model that generates from prompts of one token, so that every step has as many rows."""
    from ..integrations import generation, transformers
    from ..loading import Checkpoint

    generation.prepare(1, 0)
    tokens = settings["tokens"]
    checkpoint = Checkpoint.open(Path(settings["model"]))
    vocabulary = checkpoint.config.get("vocab_size")
    if not isinstance(vocabulary, int):
        raise SidpError(f"{settings['model']} does not say its vocab_size")
    pooled = transformers.load_pooled_model(checkpoint, group, mode=settings["mode"], max_rows=tokens)
    closed.callback(pooled.close)
    prompts = [[1 + i % (vocabulary - 1)] for i in range(tokens)]

    def make_steps(count: int) -> None:
        generation.generate_batch(pooled.model, prompts, count, 0, [])

    return pooled.runtime, make_steps
