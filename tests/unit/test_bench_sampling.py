"""How the benchmarks sample: in which order, after how many uncounted calls, by which clock; ranks are threads here."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bench.clocks
import bench.rank
from bench.cases import ring_depth, scale_steps, step_boundary, step_time
from bench.rank import Pace, RankContext, Sample, Samples
from bench.shapes import SHAPES
from sidp_runtime._torch_gpu import HEAVY_ROWS

Log = list[tuple[str, int]]  # subject, calls


class Store:
    """Of threads: ``get`` waits for what another sets."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()

    def get(self, key: str) -> str:
        with self.changed:
            assert self.changed.wait_for(lambda: key in self.values, 10), f"no rank gave {key}"
            return self.values[key]


def context(
    folder: Path, rank: int = 0, store: Store | None = None, backend: str = "nvshmem", quick: bool = False
) -> RankContext:
    made = RankContext(
        case="case",
        rank=rank,
        world_size=2 if store else 1,
        backend=backend,
        shape=SHAPES["small"],
        quick=quick,
        token="",
        port=0,
        rows=folder / "rows.jsonl",
        num_gpus=2,
    )
    made.__dict__["store"] = store or Store()
    return made


def contest(folder: Path, most: dict[str, tuple[int, int]], broken: Callable[[int, str, int], bool], **how: Any) -> Any:
    """Two ranks' results and logs. ``most``: how many calls each would make; ``broken``: (rank, subject, calls)."""
    store = Store()

    def of(rank: int) -> tuple[Samples, Log]:
        log: Log = []

        def subject(name: str) -> Callable[[], tuple[Sample, int]]:
            def sample(n: int) -> float:
                log.append((name, n))
                if broken(rank, name, n):
                    raise RuntimeError("it broke")
                return float(rank + len(log))

            return lambda: (sample, most[name][rank])

        return context(folder, rank, store).contest({name: subject(name) for name in most}, **how), log

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(of, range(2)))


def test_all_ranks_make_the_same_calls_ahead_of_a_sample_and_every_second_round_is_reversed(tmp_path: Path) -> None:
    pace = Pace(sample_s=0.1, ahead_s=0.25)
    (first, log), (second, other) = contest(tmp_path, {"a": (4, 9), "b": (5, 2)}, lambda *_: False, pace=pace)
    a, b = [("a", 10), ("a", 4)], [("b", 5), ("b", 2)]
    assert log == other == a + b + b + a + a + b
    assert (
        first.seconds == second.seconds == {"a": [3, 9, 11], "b": [5, 7, 13]}
    )  # the counted call's, of the slower rank


def test_without_a_pace_nothing_comes_ahead_of_a_sample(tmp_path: Path) -> None:
    (_, log), (_, other) = contest(tmp_path, {"a": (4, 4)}, lambda *_: False)
    assert log == other == [("a", 4)] * 3


def test_what_breaks_ahead_of_a_sample_has_a_reason_and_no_figure(tmp_path: Path) -> None:
    most = {"sidp": (2, 2), "peer": (2, 2)}
    results = contest(tmp_path, most, lambda rank, name, n: (rank, name, n) == (1, "sidp", 6), pace=Pace(0.1, 0.3))
    for result, log in results:
        assert result.missing == {"sidp": ("error", "RuntimeError: it broke")}
        assert list(result.seconds) == ["peer"]
        assert log == [("sidp", 6), *[("peer", 6), ("peer", 2)] * 3]


def test_steps_are_heated_by_themselves_on_a_gpu_for_longer_where_products_take_the_time(tmp_path: Path) -> None:
    gpu, host, quick = context(tmp_path), context(tmp_path, backend="host"), context(tmp_path, quick=True)
    assert gpu.pace(HEAVY_ROWS) == Pace(0.25, 0.5)
    assert gpu.pace(HEAVY_ROWS - 1) == Pace(0.12, 0.05)
    assert quick.pace(HEAVY_ROWS).ahead_s == 0.5  # a short sample is no colder
    assert {host.pace(rows).ahead_s for rows in (1, HEAVY_ROWS)} == {0.0}


@pytest.mark.parametrize(
    ("case", "more"), [(step_time, (None, None)), (step_boundary, ()), (ring_depth, ()), (scale_steps, ([],))]
)
def test_every_case_of_steps_is_sampled_at_their_pace(tmp_path: Path, case: Any, more: tuple[Any, ...]) -> None:
    made = context(tmp_path)
    asked: dict[str, Any] = {}

    class Asked(Exception):
        """Nothing is to follow."""

    def contest(_: Any, **how: Any) -> None:
        asked.update(how)
        raise Asked

    made.contest = contest  # type: ignore[method-assign]
    pool = SimpleNamespace(placement=SimpleNamespace(num_slots=lambda _: 2))
    replica = SimpleNamespace(rows=lambda _: None, shape=made.shape, pool=pool)
    how = {"exclusive": True} if case is scale_steps else {}
    with pytest.raises(Asked):
        case._one_count(made, replica, *((2,) if case is ring_depth else ()), 4096, *more, **how)
    assert asked["pace"] == made.pace(4096) != made.pace(1)
    assert asked.get("clock", False) == (case in (step_time, scale_steps))


def test_as_many_steps_as_take_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = context(tmp_path)
    for step_s, most in ((0.05, 5), (0.4, 1), (0.001, bench.rank.MOST_STEPS)):
        monkeypatch.setattr(made, "time", lambda *_, seconds=step_s, **__: seconds)
        _, count = made.steps(lambda: lambda: None, Pace(0.25, 0.25))()
        assert count == most


def test_the_clock_is_that_of_what_counts_and_has_no_direction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[tuple[list[float], list[float]]] = []

    @contextmanager
    def state(device: torch.device, clocks: list[float], powers: list[float]) -> Iterator[None]:
        running.append((clocks, powers))
        yield
        assert running.pop()[0] is clocks

    monkeypatch.setattr(bench.rank, "gpu_state", state)
    made = context(tmp_path)
    meet = made.meet

    def meet_unclocked() -> None:
        assert running == []  # it is not the clock of a GPU that waits
        meet()

    monkeypatch.setattr(made, "meet", meet_unclocked)

    def sample(n: int) -> float:
        for clocks, powers in running:
            clocks.append(1980.0 - n)
            powers.append(100.0 * n)
        return 1.0

    subjects = {"a": lambda: (sample, 4), "b": lambda: (lambda _: 1.0, 4)}
    assert made.contest(subjects, pace=Pace(0.1, 0.2)).clock_mhz == {}
    samples = made.contest(subjects, pace=Pace(0.1, 0.2), clock=True)
    made.record_clocks(samples, {"tokens": 8})
    a, b, power, _ = (json.loads(line) for line in (tmp_path / "rows-0.jsonl").read_text().splitlines())
    assert (a["key"], a["samples"]) == ("case/sm_clock/a tokens=8", [1976.0] * 3)
    assert (power["key"], power["samples"]) == ("case/power/a tokens=8", [400.0] * 3)
    assert a["higher_is_better"] is None
    assert (b["status"], b["reason"]) == ("unavailable", bench.clocks.MISSING)


def test_nvml_starts_once_and_gives_the_clock_and_power_of_each_body(monkeypatch: pytest.MonkeyPatch) -> None:
    starts, asked, mhz = [], [], [1000.0]

    def read(handle: str, kind: str) -> float:
        asked.append((handle, kind))
        return mhz[0]

    def fields(handle: str, names: list[str]) -> list[SimpleNamespace]:
        assert (handle, names) == ("GPU-0-1", ["power"])
        milliwatts = int(mhz[0] * 400)
        return [SimpleNamespace(nvmlReturn=0 if mhz[0] > 1300 else 3, value=SimpleNamespace(uiVal=milliwatts))]

    nvml = SimpleNamespace(
        NVMLError=OSError,
        NVML_SUCCESS=0,
        NVML_CLOCK_SM="sm",
        NVML_FI_DEV_POWER_INSTANT="power",
        nvmlInit=lambda: starts.append(1),
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetClockInfo=read,
        nvmlDeviceGetFieldValues=fields,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="0-1"))
    bench.clocks._open.cache_clear()
    clocks: list[float] = []
    powers: list[float] = []
    try:
        for mhz[0] in (1500.0, 1200.0):
            with bench.clocks.gpu_state(torch.device("cuda", 0), clocks, powers):
                seen = len(asked)
                while len(asked) < seen + 3:
                    time.sleep(0.001)
    finally:
        bench.clocks._open.cache_clear()
    assert (clocks, len(starts), set(asked)) == ([1500.0, 1200.0], 1, {("GPU-0-1", "sm")})
    assert powers == [600.0]  # the second time the driver did not tell it
    assert bench.clocks._open(torch.device("cpu")) == (None, None)
