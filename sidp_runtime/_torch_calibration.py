"""A rank of ``sidp calibrate``: steps over synthetic layers of a model's shape, through the library itself."""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.nn import functional

from . import _torch, _torch_gpu, machine_profile
from ._C import Mode
from .errors import SidpError, UnhelpfulWarning
from .group import Group
from .machine_profile import LinearTimes, MachineProfile
from .manifest import DTYPE_BYTES, LayerSpec, TensorSpec
from .ops import Op
from .placement import Placement
from .policy import ModePolicy
from .runtime import Runtime
from .weight_pool import WeightPool

WAS_SIZE, CAS_SIZE = 1, 2  # num_tokens of measured steps: the batch sizes whose modes the policy has fixed
_FIXED = {WAS_SIZE: Mode.WAS, CAS_SIZE: Mode.CAS}
_NO_MACHINE = MachineProfile(1e9, 1.0, 1e9, 1e9)  # modes are fixed, so nothing is predicted from it
_SMALL = 64  # columns of the layers that copies and requests of no size are measured with
_SMALL_LAYERS = 16
_MANY_ROWS, _MANY_COLUMNS = 2048, 1024  # of a request that is mostly sent
_SAMPLE_S = 0.05
_SAMPLES = 5
_HEAVY_SAMPLES = 3


@dataclass(frozen=True)
class CalibrationJob:
    """What the ranks do. Sizes are columns; ``rows`` ascend; ``check``: rows of steps to predict and to measure."""

    backend: str
    world_size: int
    dtype: str
    hidden: int
    q: int
    kv: int
    inner: int
    gated: bool
    num_layers: int
    rows: tuple[int, ...]
    check: tuple[int, ...] = ()
    profile: MachineProfile | None = None  # to predict with; None: what is measured
    deadline_ms: int = 120_000

    def layers(self) -> list[LayerSpec]:
        shapes = {
            "q": (self.q, self.hidden),
            "k": (self.kv, self.hidden),
            "v": (self.kv, self.hidden),
            "o": (self.hidden, self.q),
            **({"gate": (self.inner, self.hidden)} if self.gated else {}),
            "up": (self.inner, self.hidden),
            "down": (self.hidden, self.inner),
        }
        return [
            LayerSpec(f"l{i}", tuple(TensorSpec(name, shape, self.dtype) for name, shape in shapes.items()))
            for i in range(self.num_layers)
        ]

    def ops(self) -> list[Op]:
        """The three of the transformers integration: attention's inputs, its output, the MLP."""

        def qkv(w: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(functional.linear(x, w[name]) for name in ("q", "k", "v"))

        def out(w: Any, x: torch.Tensor) -> torch.Tensor:
            return functional.linear(x, w["o"])

        def mlp(w: Any, x: torch.Tensor) -> torch.Tensor:
            up = functional.linear(x, w["up"])
            inner = functional.silu(functional.linear(x, w["gate"])) * up if self.gated else functional.silu(up)
            return functional.linear(inner, w["down"])

        every = range(self.num_layers)
        names = ["gate", "up", "down"] if self.gated else ["up", "down"]
        return [
            Op("qkv", qkv, self.hidden, self.dtype, {i: {n: n for n in ("q", "k", "v")} for i in every}),
            Op("out", out, self.q, self.dtype, {i: {"o": "o"} for i in every}),
            Op("mlp", mlp, self.hidden, self.dtype, {i: {n: n for n in names} for i in every}),
        ]


def rank_main(rank: int, job: CalibrationJob, port: int, token: str, results: Connection) -> None:
    """The process of a rank. Sends ``{"stage"}`` as it goes, then ``{"error"}`` or what it found, as JSON."""
    try:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore", UnhelpfulWarning)
        store = _torch.connect_store("127.0.0.1", port, job.deadline_ms)
        device = rank if job.backend != "host" else None
        with Group(
            rank, job.world_size, store, backend=job.backend, token=token, deadline_ms=job.deadline_ms, device=device
        ) as group:
            results.send(json.dumps(_Rank(group, job, results).run()))
            group.barrier("end")
    except SidpError as error:
        results.send(json.dumps({"error": f"rank {rank}: {error}"}))
    finally:
        results.close()


class _Rank:
    def __init__(self, group: Group, job: CalibrationJob, results: Connection) -> None:
        self.group, self.job, self.device, self.results = group, job, group.device, results
        self.where = torch.device("cpu") if group.device is None else torch.device("cuda", group.device)
        self.meetings = 0

    def _stage(self, words: str) -> None:
        self.results.send(json.dumps({"stage": words}))

    def run(self) -> dict[str, Any]:
        with torch.no_grad():
            self._stage("small copies and requests")
            found: dict[str, Any] = {"key": machine_profile.machine_key(self.device)} | self._small()
            self._stage("a pool of layers")
            with self._replica(self.job.layers(), self.job.ops(), self._buckets(), None) as (pool, runtime):
                found |= self._link(pool, runtime, found["copy_latency_us"]) | self._products(pool)
            mine = self._profile(found)
            all_profiles = [json.loads(p) for p in self.group.all_gather("profile", json.dumps(mine.facts()).encode())]
            profile = mean_profile([MachineProfile.from_facts(facts) for facts in all_profiles])
            found["facts"] = profile.facts()
            if self.job.check:
                found["check"] = self._check(self.job.profile or profile)
        return found

    def _buckets(self) -> list[int]:
        return sorted(set(self.job.check) | {CAS_SIZE})

    @contextmanager
    def _replica(
        self, layers: list[LayerSpec], ops: Sequence[Op], buckets: list[int], profile: MachineProfile | None
    ) -> Iterator[tuple[WeightPool, Runtime]]:
        placement = Placement.by_layer([s.num_bytes for s in layers], self.group.world_size, ring_slots=2)
        rows = {"max_rows": buckets[-1]} if self.device is None else {"row_buckets": buckets}
        with WeightPool(self.group, layers, placement) as pool:
            for i in pool.local_layers:
                for tensor in pool.layer_view(i).values():
                    tensor.normal_(std=0.02)
            pool.publish()
            policy = ModePolicy(profile or _NO_MACHINE, fixed=_FIXED)
            with Runtime(pool, policy=policy, ops=ops, **rows) as runtime:
                yield pool, runtime
                self._meet()  # nobody leaves while another one asks

    def _meet(self) -> None:
        self._gather("")

    def _gather(self, word: str) -> list[str]:
        self.meetings += 1
        return [answer.decode() for answer in self.group.all_gather(f"calibration {self.meetings}", word.encode())]

    def _seconds(self, call: Callable[[], object], rows: int = 1) -> float:
        """Of a call: median of samples of many calls each, every rank at the same time."""

        def sample(count: int) -> float:
            if self.device is None:
                start = time.perf_counter()
                for _ in range(count):
                    call()
                return (time.perf_counter() - start) / count
            # Behind a call that does not count; to wait for the device at the end would count the copies ahead too.
            _torch_gpu.synchronize(self.device)
            call()
            return _torch_gpu.stream_seconds(call, count)

        sample(1)
        # The same on all ranks, as one may need the other's answers
        once = max(map(float, self._gather(str(sample(1)))))
        heavy = self.device is not None and rows >= _torch_gpu.HEAVY_ROWS
        sample_s, samples = (_torch_gpu.HEAVY_SAMPLE_S, _HEAVY_SAMPLES) if heavy else (_SAMPLE_S, _SAMPLES)
        if heavy:
            sample(max(1, int(_torch_gpu.HEAT_S / max(once, 1e-9))))
        count = max(1, min(200, int(sample_s / max(once, 1e-9))))
        self._meet()
        found = statistics.median(sample(count) for _ in range(samples if once < sample_s else 2))  # long calls: fewer
        self._meet()
        return found

    def _stepper(self, runtime: Runtime, size: int, body: Callable[[], object]) -> Callable[[], None]:
        """A step of that size whose calls ``body`` makes: as they are on the host, captured once on a GPU."""
        if self.device is None:

            def eager() -> None:
                with runtime.step(num_tokens=size):
                    body()

            return eager
        graph = torch.cuda.CUDAGraph()
        with _capture(graph), runtime.capture_step(size, _FIXED[size]):
            body()

        def replay() -> None:
            with runtime.replay_step(size) as step:
                step.replay(graph)

        return replay

    def _plain(self, body: Callable[[], object]) -> Callable[[], object]:
        """Work without the library, captured on a GPU."""
        if self.device is None:
            return body
        body()  # libraries set themselves up at the first call
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with _capture(graph):
            body()
        return graph.replay

    def _small(self) -> dict[str, float]:
        """Copies and requests of hardly any bytes, then requests of rows alone."""
        layers = [
            LayerSpec(f"l{i}", (TensorSpec("w", (_SMALL, _SMALL), self.job.dtype),)) for i in range(_SMALL_LAYERS)
        ]
        every = {i: {"w": "w"} for i in range(_SMALL_LAYERS)}
        touch = Op("touch", lambda w, x: functional.linear(x, w["w"]), _SMALL, self.job.dtype, every)
        send = Op("send", lambda w, x: functional.relu(x), _MANY_COLUMNS, self.job.dtype, every)
        with self._replica(layers, [touch, send], [1, CAS_SIZE, _MANY_ROWS], None) as (pool, runtime):
            streamed = pool.placement.streamed_layers(self.group.rank)
            weights = [pool.layer_view(i) for i in pool.local_layers]
            copies_s = self._seconds(self._stepper(runtime, WAS_SIZE, lambda: _fetch_all(pool, runtime)))

            def request_s(op: Op, rows: int) -> float:
                x = torch.zeros(rows, op.in_features, dtype=_torch.dtype_of(self.job.dtype), device=self.where)

                def ask() -> None:
                    for i in streamed:
                        runtime.remote_compute(i, op.name, x)

                asked_s = self._seconds(self._stepper(runtime, CAS_SIZE, ask)) / len(streamed)
                here_s = self._seconds(self._plain(lambda: [op.function(w, x) for w in weights])) / len(weights)
                return max(asked_s - here_s, 0.1e-6)

            one_s, many_s = request_s(touch, 1), request_s(send, _MANY_ROWS)
            runtime.check()
        num_bytes = 2 * _MANY_ROWS * _MANY_COLUMNS * DTYPE_BYTES[self.job.dtype]
        return {
            "copy_latency_us": copies_s / len(streamed) * 1e6,
            "round_trip_us": one_s * 1e6,
            "request_bytes_per_s": num_bytes / max(many_s - one_s, 1e-9),
        }

    def _link(self, pool: WeightPool, runtime: Runtime, latency_us: float) -> dict[str, float]:
        """Steps that only stream; the latency is known from small copies."""
        self._stage("the link")
        streamed = pool.placement.streamed_layers(self.group.rank)
        num_bytes = sum(pool.placement.layer_bytes(i) for i in streamed)
        seconds = self._seconds(self._stepper(runtime, WAS_SIZE, lambda: _fetch_all(pool, runtime)))
        runtime.check()
        return {"copy_bytes_per_s": num_bytes / max(seconds - len(streamed) * latency_us * 1e-6, seconds / 2)}

    def _products(self, pool: WeightPool) -> dict[str, Any]:
        """A layer's products by rows, with the weights of all local layers in turn, so that no cache holds them."""
        weights = [pool.layer_view(i) for i in pool.local_layers]
        layer_s = []
        for rows in self.job.rows:
            self._stage(f"products of {rows} rows")
            x = self._rows(rows)
            every = self._plain(lambda x=x: [self._layer(w, x) for w in weights])  # type: ignore[misc]
            layer_s.append(self._seconds(every, rows) / len(weights))
        return {"layer_s": layer_s}

    def _rows(self, rows: int) -> torch.Tensor:
        return torch.randn(rows, self.job.hidden, device=self.where).to(_torch.dtype_of(self.job.dtype))

    def _layer(self, w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        qkv, out, mlp = (op.function for op in self.job.ops())
        result: torch.Tensor = mlp(w, out(w, qkv(w, x)[0]))
        return result

    def _profile(self, found: dict[str, Any]) -> MachineProfile:
        num_bytes = self.job.layers()[0].num_bytes
        rising: list[float] = []
        for seconds in found["layer_s"]:
            rising.append(max([seconds, *rising[-1:]]))
        flops = 2.0 * self.job.rows[-1] * num_bytes / DTYPE_BYTES[self.job.dtype]
        return MachineProfile(
            copy_bytes_per_s=found["copy_bytes_per_s"],
            round_trip_us=found["round_trip_us"],
            memory_bytes_per_s=num_bytes / rising[0],
            flops_per_s=flops / rising[-1],
            copy_latency_us=found["copy_latency_us"],
            # No link is faster for requests; on a busy host it may look so
            request_bytes_per_s=min(found["request_bytes_per_s"], found["copy_bytes_per_s"]),
            assumed=("request_bytes_per_s",) if found["request_bytes_per_s"] > found["copy_bytes_per_s"] else (),
            linear_times=LinearTimes(num_bytes, self.job.rows, tuple(rising)),
        )

    def _check(self, profile: MachineProfile) -> list[dict[str, float]]:
        """Steps of each size in both modes, through the library, beside what the policy predicts of them."""
        found = []
        self._stage("a pool with that profile")
        with self._replica(self.job.layers(), self.job.ops(), self._buckets(), profile) as (pool, runtime):
            for rows in self.job.check:
                self._stage(f"steps of {rows} rows in both modes")
                x = self._rows(rows)

                # The same rows for each layer: from one to the next they would overflow, and products of NaN take a GPU
                # less power, so less time.
                def forward(mode: Mode, x: torch.Tensor = x) -> None:
                    for i in range(self.job.num_layers):
                        if mode == Mode.WAS or pool.is_local(i):
                            self._layer(runtime.fetch_layer(i), x)
                            runtime.release_layer(i)
                        else:
                            _remote_layer(runtime, i, x)

                was_s, cas_s = (
                    self._seconds(self._stepper(runtime, size, lambda mode=mode: forward(mode)), rows)  # type: ignore[misc]
                    for size, mode in _FIXED.items()
                )
                runtime.check()
                times = runtime._core.predict(rows)
                found.append(
                    {
                        "tokens": rows,
                        "was_predicted_ms": times.was_s * 1e3,
                        "was_measured_ms": was_s * 1e3,
                        "cas_predicted_ms": times.cas_s * 1e3,
                        "cas_measured_ms": cas_s * 1e3,
                    }
                )
        return found


def mean_profile(profiles: Sequence[MachineProfile]) -> MachineProfile:
    """Of ranks that measured the same: means of times, so harmonic ones of rates."""

    def rate(name: str) -> float:
        return float(statistics.harmonic_mean([getattr(p, name) for p in profiles]))

    def time_of(name: str) -> float:
        return statistics.fmean(getattr(p, name) for p in profiles)

    curves = [p.linear_times for p in profiles]
    first = curves[0]
    assert first is not None
    seconds = tuple(statistics.fmean(c.seconds[i] for c in curves if c is not None) for i in range(len(first.rows)))
    return MachineProfile(
        copy_bytes_per_s=rate("copy_bytes_per_s"),
        round_trip_us=time_of("round_trip_us"),
        memory_bytes_per_s=rate("memory_bytes_per_s"),
        flops_per_s=rate("flops_per_s"),
        copy_latency_us=time_of("copy_latency_us"),
        request_bytes_per_s=rate("request_bytes_per_s"),
        linear_times=LinearTimes(first.num_bytes, first.rows, seconds),
        assumed=tuple(sorted({name for p in profiles for name in p.assumed})),
    )


def _capture(graph: torch.cuda.CUDAGraph) -> torch.cuda.graph:
    """Other threads may go on: another rank may be asking this one's service already."""
    return torch.cuda.graph(graph, capture_error_mode="thread_local")


def _fetch_all(pool: WeightPool, runtime: Runtime) -> None:
    for i in pool.placement.streamed_layers(pool.group.rank):
        runtime.fetch_layer(i)
        runtime.release_layer(i)


def _remote_layer(runtime: Runtime, layer: int, x: torch.Tensor) -> None:
    q = runtime.remote_compute(layer, "qkv", x)[0]
    out = runtime.remote_compute(layer, "out", q)
    assert isinstance(out, torch.Tensor)
    runtime.remote_compute(layer, "mlp", out)
