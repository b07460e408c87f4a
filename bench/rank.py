"""Inside a rank's process: meeting the others, timing, and handing figures to the program that started it."""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

import sidp_runtime as sidp
from sidp_runtime import _torch
from sidp_runtime._torch_gpu import HEAT_S, HEAVY_ROWS, HEAVY_SAMPLE_S, stream_seconds

from .clocks import MISSING, gpu_state
from .harness import OWN, Bar, Figure
from .shapes import Shape

SPIN_CYCLES = 6_000_000  # about 3 ms of one SM: longer than it takes to queue what is timed
DEADLINE_MS = 30_000
STORE_MS = 60_000  # ranks wait for each other's captures
MOST_STEPS = 30  # in a sample


class Unavailable(Exception):
    """A subject that this machine or these versions cannot run; the message says why."""


class WrongDataError(Exception):
    """A copy or a result differs from what it must be: its speed means nothing."""


class DilutedSampleError(Exception):
    """What a sample was to be taken beside had ended before it: the figure would be too good."""


@dataclass
class Samples:
    """Of each subject: seconds of one iteration by repeat (the slowest rank's), or why there are none.

    ``clock_mhz``, ``power_w``: of this rank's GPU during each sample, where a contest was asked for them and they can
    be read.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    missing: dict[str, tuple[str, str]] = field(default_factory=dict)  # subject -> status, reason
    clock_mhz: dict[str, list[float]] = field(default_factory=dict)
    power_w: dict[str, list[float]] = field(default_factory=dict)

    def failed(self, subject: str, answers: Sequence[Mapping[str, Any]]) -> bool:
        """Whether any rank's attempt failed; the worst is kept as the reason."""
        bad = [answer for answer in answers if "status" in answer]
        if bad:
            worst = min(bad, key=lambda answer: str(answer["status"]))  # "error" before "unavailable"
            self.missing[subject] = worst["status"], worst["reason"]
            self.seconds.pop(subject, None)
        return bool(bad)


@dataclass(frozen=True)
class Pace:
    """Seconds of a sample, and of the same subject's calls right ahead of it that do not count."""

    sample_s: float
    ahead_s: float = 0.0

    def ahead(self, iterations: int) -> int:
        """Calls ahead of a sample of so many: from its number, so all ranks make equally many."""
        return math.ceil(iterations * self.ahead_s / self.sample_s)


#: Seconds of one of so many iterations on this rank.
Sample = Callable[[int], float]
#: Makes ready, verifies, and gives the sample and how many iterations it should have at most.
Subject = Callable[[], tuple[Sample, int]]
#: Iterations of a rank that takes no part in a sample.
IDLE: tuple[Sample, int] = (lambda _: 0.0, 1 << 30)


def _attempt(name: str, call: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"value": call()}
    except Unavailable as why:
        return {"status": "unavailable", "reason": str(why)}
    except Exception as error:
        traceback.print_exc()
        own = name.startswith(OWN) or isinstance(error, (WrongDataError, DilutedSampleError))
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return {"status": "error" if own else "unavailable", "reason": text}


@dataclass
class RankContext:
    """What a case's ``run`` gets. Every method but ``time`` and the properties is collective."""

    case: str
    rank: int
    world_size: int
    backend: str
    shape: Shape
    quick: bool
    token: str
    port: int
    rows: Path
    num_gpus: int
    group_s: float = 0.0
    _meetings: int = 0

    @property
    def on_gpu(self) -> bool:
        return self.backend != "host"

    @property
    def peer(self) -> int:
        return (self.rank + 1) % self.world_size

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.rank % self.num_gpus) if self.on_gpu else torch.device("cpu")

    @property
    def shares_gpu(self) -> bool:
        return self.on_gpu and self.num_gpus < self.world_size

    @property
    def repeats(self) -> int:
        return 3

    @cached_property
    def store(self) -> Any:
        return _torch.connect_store("127.0.0.1", self.port, STORE_MS)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value (JSON), by rank."""
        self._meetings += 1
        keys = [f"gather/{self._meetings}/{rank}" for rank in range(self.world_size)]
        self.store.set(keys[self.rank], json.dumps(value))
        return [json.loads(self.store.get(key)) for key in keys]

    def meet(self) -> None:
        self.gather(None)

    @cached_property
    def group(self) -> sidp.Group:
        """The case's group; ``group_s`` is how long it took."""
        start = time.perf_counter()
        group = sidp.Group(
            self.rank,
            self.world_size,
            self.store,
            backend=self.backend,
            token=self.token,
            deadline_ms=DEADLINE_MS,
            device=self.device.index,
        )
        self.group_s = time.perf_counter() - start
        return group

    # --- Figures ----------------------------------------------------------------------------------------------------

    def figure(self, metric: str, subject: str, unit: str, **arguments: Any) -> None:
        """A row; rank 0's counts. ``arguments``: of ``Figure``."""
        if self.rank == 0:
            figure = Figure(self.case, metric, subject, unit, **arguments)
            document = figure.to_json()
            if figure.bar is not None:
                document["bar_gpus"] = figure.bar.gpus
            self._write(document)

    def event(self, **values: Any) -> None:
        """An entry of the report's timeline."""
        self._write({"event": {"rank": self.rank, **values}})

    def _write(self, document: dict[str, Any]) -> None:
        with self.rows.with_name(f"{self.rows.stem}-{self.rank}.jsonl").open("a") as file:
            file.write(json.dumps(document) + "\n")

    def contest(
        self,
        subjects: Mapping[str, Subject],
        *,
        ranks: Callable[[list[float]], float] = max,
        pace: Pace | None = None,
        clock: bool = False,
    ) -> Samples:
        """Prepares every subject and then samples each ``repeats`` times in turn, every second time in reverse order.

        ``ranks``: what stands for all ranks, by default the slowest. ``pace``: each sample follows an uncounted one of
        the same subject, ``ahead_s`` long. ``clock``: ``clock_mhz`` and ``power_w`` are wanted. A peer that
        raises on any rank has no row but a reason; what this package raises, and wrong data, is an error. Subjects do
        not use the context's collectives.
        """
        result = Samples()
        if clock:
            self._sample(lambda _: 0.0, 0, ([], []))  # NVML starts now, not while a GPU that is to be hot waits for it
        ready: dict[str, tuple[Sample, int]] = {}
        for name, prepare in subjects.items():
            self.meet()
            mine = _attempt(name, prepare)
            answers = self.gather({**mine, "value": mine["value"][1] if "value" in mine else None})
            if not result.failed(name, answers):
                ready[name] = mine["value"][0], min(answer["value"] for answer in answers)
        for repeat in range(self.repeats):
            for name in list(ready)[:: -1 if repeat % 2 else 1]:  # what ran just before has left the GPU hot or cool
                sample, iterations = ready[name]
                if pace and (ahead := pace.ahead(iterations)):
                    # They meet again after it: steps that are to start together do, and a faster GPU has not run away.
                    answers = self._attempt_together(name, partial(sample, ahead))
                    if result.failed(name, answers):
                        del ready[name]
                        continue
                state = (result.clock_mhz.setdefault(name, []), result.power_w.setdefault(name, [])) if clock else None
                answers = self._attempt_together(name, partial(self._sample, sample, iterations, state))
                if result.failed(name, answers):
                    del ready[name]
                else:
                    result.seconds.setdefault(name, []).append(ranks([answer["value"] for answer in answers]))
        return result

    def _attempt_together(self, name: str, call: Callable[[], Any]) -> list[dict[str, Any]]:
        """Ranks begin at the same time and have each other's answers."""
        self.meet()
        return self.gather(_attempt(name, call))

    def _sample(self, sample: Sample, iterations: int, state: tuple[list[float], list[float]] | None) -> float:
        with nullcontext() if state is None else gpu_state(self.device, *state):
            return sample(iterations)

    def record(
        self,
        samples: Samples,
        metric: str,
        unit: str,
        value: Callable[[float], float],
        *,
        higher_is_better: bool,
        parameters: Mapping[str, int | str] | None = None,
        bars: Mapping[str, Bar] | None = None,
    ) -> None:
        """Rows of a contest. ``value``: the metric of so many seconds an iteration."""
        for name, seconds in samples.seconds.items():
            self.figure(
                metric,
                name,
                unit,
                parameters=parameters or {},
                samples=tuple(map(value, seconds)),
                higher_is_better=higher_is_better,
                bar=(bars or {}).get(name),
            )
        for name, (status, reason) in samples.missing.items():
            self.figure(metric, name, unit, parameters=parameters or {}, status=status, reason=reason,
                        higher_is_better=higher_is_better)  # fmt: skip

    def record_clocks(self, samples: Samples, parameters: Mapping[str, int | str]) -> None:
        """Rows ``sm_clock`` and ``power`` of a contest: of rank 0's GPU. They explain, and have no direction."""
        for metric, unit, readings in (("sm_clock", "MHz", samples.clock_mhz), ("power", "W", samples.power_w)):
            for name in samples.seconds:
                read = tuple(readings[name])
                row: dict[str, Any] = {"samples": read} if read else {"status": "unavailable", "reason": MISSING}
                self.figure(metric, name, unit, parameters=parameters, **row)

    # --- Time -------------------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def finish(self) -> None:
        """Waits for what was queued on the current stream; copies for the next step go on."""
        if self.on_gpu:
            torch.cuda.current_stream().synchronize()

    def time(self, call: Callable[[], object], iterations: int, *, spin: bool = False, warm: int = 1) -> float:
        """Seconds of one of ``iterations`` calls that follow ``warm`` untimed ones without a pause.

        On a GPU by events on the current stream. ``spin``: a kernel holds the stream until all is queued, so that the
        host's pace does not count.
        """
        if not self.on_gpu:
            for _ in range(warm):
                call()
            start = time.perf_counter()
            for _ in range(iterations):
                call()
            return (time.perf_counter() - start) / iterations
        self.synchronize()
        return self.time_on_busy_device(call, iterations, spin=spin, warm=warm)

    def time_on_busy_device(
        self, call: Callable[[], object], iterations: int, *, spin: bool = False, warm: int = 1
    ) -> float:
        """``time`` on a GPU without waiting first for what other streams do."""
        if spin:
            torch.cuda._sleep(SPIN_CYCLES)  # type: ignore[no-untyped-call]
        for _ in range(warm):
            call()
        return stream_seconds(call, iterations)

    def sampled(
        self, call: Callable[[], object], sample_s: float, *, most: int = 300, spin: bool = False, warm: int = 1
    ) -> tuple[Sample, int]:
        """A subject's sample of repeated calls, and how many take about ``sample_s``."""
        self.time(call, 1, spin=spin, warm=warm)
        once = self.time(call, 1, spin=spin, warm=warm)
        return lambda n: self.time(call, n, spin=spin, warm=warm), max(1, min(most, int(sample_s / max(once, 1e-9))))

    def pace(self, rows: int) -> Pace:
        """Of steps of so many rows.

        A GPU whose power limit is reached changes its clock over tenths of a second. Every subject is to be timed at
        the clock that it brings about itself, not at the one that the subject before it has left.
        """
        heavy = self.on_gpu and rows >= HEAVY_ROWS
        ahead_s = HEAT_S if heavy else 0.05
        return Pace(0.05 if self.quick else HEAVY_SAMPLE_S if heavy else 0.12, ahead_s if self.on_gpu else 0.0)

    def steps(self, make: Callable[[], Callable[[], object]], pace: Pace) -> Subject:
        """A subject of repeated steps; ``make`` gives the call of one. For a ``contest`` of the same pace."""
        return lambda: self.sampled(make(), pace.sample_s, most=MOST_STEPS)


@contextmanager
def on_own_stream(context: RankContext) -> Iterator[None]:
    """Cases run on a stream of their own: the legacy default stream would wait for every other."""
    if not context.on_gpu:
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream(context.device)):  # type: ignore[no-untyped-call]
        yield
