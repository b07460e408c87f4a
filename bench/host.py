"""The host backend: ring fetch beside one thread's memcpy, and the round trip of ``remote_compute``."""

from __future__ import annotations

import multiprocessing
import secrets
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch.nn import functional

from sidp_runtime import (
    Group,
    LayerSpec,
    Mode,
    ModePolicy,
    Op,
    Placement,
    Runtime,
    TensorSpec,
    WeightPool,
    _torch,
)
from sidp_runtime.errors import SidpError

from .harness import Figure, Report, seconds

LAYERS = 16  # half of them streamed
HIDDEN = 1024
LAYER_ROWS = 8192  # 32 MiB of float32 a layer
ROWS = 64
STEPS = 8  # of a sample
SAMPLES = 7
DEADLINE_MS = 60_000


def _open(rank: int, port: int, token: str, mode: Mode) -> tuple[WeightPool, Runtime]:
    torch.set_num_threads(1)
    store = _torch.connect_store("127.0.0.1", port, DEADLINE_MS)
    group = Group(rank, 2, store, name=str(mode), token=token, deadline_ms=DEADLINE_MS)
    layers = [LayerSpec(f"layer{i}", (TensorSpec("w", (LAYER_ROWS, HIDDEN), "float32"),)) for i in range(LAYERS)]
    pool = WeightPool(group, layers, Placement.by_layer([layer.num_bytes for layer in layers], 2))
    for i in pool.local_layers:
        pool.layer_view(i)["w"].fill_(i)
    pool.publish()
    square = Op(
        "square",
        lambda w, x: functional.linear(x, w["w"][:HIDDEN]),
        HIDDEN,
        "float32",
        {i: {"w": "w"} for i in range(LAYERS)},
    )
    runtime = Runtime(pool, policy=ModePolicy.calibrated(fixed=mode), ops=[square], max_rows=ROWS)
    return pool, runtime


def _owner(port: int, token: str, mode_name: str, done: Connection) -> None:
    """The other rank: takes no step, only owns."""
    pool, runtime = _open(1, port, token, Mode.__members__[mode_name])
    done.poll(None)  # until the measuring rank closes its end
    runtime.close()
    pool.close()


def _fetch_figures(pool: WeightPool, runtime: Runtime) -> list[Figure]:
    streamed = pool.placement.streamed_layers(0)
    layer_bytes = pool.layers[0].num_bytes
    source = [np.ones(layer_bytes, dtype=np.uint8) for _ in streamed]
    target = [np.ones(layer_bytes, dtype=np.uint8) for _ in range(2)]

    def steps() -> None:
        for _ in range(STEPS):
            with runtime.step(num_tokens=1):
                for i in streamed:
                    runtime.fetch_layer(i)
                    runtime.release_layer(i)

    def copies() -> None:
        for _ in range(STEPS):
            for k, layer in enumerate(source):
                np.copyto(target[k % 2], layer)

    steps()  # pages of the peer are mapped on first touch
    copies()
    with runtime.step(num_tokens=1):
        for i in streamed:
            got = runtime.fetch_layer(i)["w"][[0, -1], [0, -1]].tolist()
            runtime.release_layer(i)
            if got != [i, i]:
                raise SidpError(f"layer {i} holds {got}: the copy is wrong, its speed means nothing", layer=i)
    num_bytes = STEPS * len(streamed) * layer_bytes
    fetch, copy = [], []
    for _ in range(SAMPLES):  # in turn, so that both see the same machine
        fetch.append(num_bytes / seconds(steps) / 1e9)
        copy.append(num_bytes / seconds(copies) / 1e9)
    ratio = tuple(f / c for f, c in zip(fetch, copy, strict=True))
    size = f"{layer_bytes >> 20} MiB layers"
    return [
        Figure("fetch_gbps", f"ring fetch, {size}", "GB/s", tuple(fetch)),
        Figure("memcpy_gbps", f"memcpy of one thread, {size}", "GB/s", tuple(copy)),
        Figure("fetch_over_memcpy", "ring fetch / memcpy, pair by pair", "x", ratio, at_least=0.8),
    ]


def _remote_figures(pool: WeightPool, runtime: Runtime) -> list[Figure]:
    layer = pool.placement.streamed_layers(0)[0]
    weight = torch.full((HIDDEN, HIDDEN), float(layer))
    x = torch.randn(ROWS, HIDDEN)
    repeats = 200

    def microseconds(call: object) -> float:
        assert callable(call)
        samples = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            samples.append((time.perf_counter() - start) * 1e6)
        return statistics.median(samples)

    with runtime.step(num_tokens=ROWS), torch.inference_mode():
        result = runtime.remote_compute(layer, "square", x)
        if not isinstance(result, torch.Tensor) or not torch.equal(result, functional.linear(x, weight)):
            raise SidpError("remote_compute differs from computing here", layer=layer)
        remote, local = [], []
        for _ in range(SAMPLES):
            remote.append(microseconds(lambda: runtime.remote_compute(layer, "square", x)))
            local.append(microseconds(lambda: functional.linear(x, weight)))
    over = tuple(r - c for r, c in zip(remote, local, strict=True))
    shape = f"{ROWS} rows x {HIDDEN} float32"
    return [
        Figure("remote_compute_us", f"remote_compute, {shape}", "us", tuple(remote)),
        Figure("local_compute_us", f"the same product here, {shape}", "us", tuple(local)),
        Figure("round_trip_us", "round trip over local compute", "us", over),
    ]


def main(json_path: Path | None = None, console: Console | None = None) -> Report:
    """Runs both cases with two processes and prints the table. ``Report.passed`` says whether the bars were met."""
    report = Report("sidp bench --backend host")
    for mode, figures in ((Mode.WAS, _fetch_figures), (Mode.CAS, _remote_figures)):
        token = secrets.token_hex(16)
        server, _, port = _torch.make_store_server()
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe()
        owner = context.Process(target=_owner, args=(port, token, mode.name, theirs), daemon=True)
        owner.start()
        theirs.close()
        try:
            pool, runtime = _open(0, port, token, mode)
            report.figures += figures(pool, runtime)
            runtime.close()
            pool.close()
        finally:
            mine.close()
            owner.join(10)
            if owner.is_alive():
                owner.kill()
        del server
    report.render(console or Console())
    if json_path is not None:
        report.write(json_path)
    return report
