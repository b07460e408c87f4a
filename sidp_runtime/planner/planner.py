"""The plan: schemes side by side, the best residency between SiDP and DP, and where SiDP loses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from .. import _C
from ..errors import CapacityError, ConfigError
from ..placement import choose_resident_layers
from . import memory, step_time
from .gpus import GpuProfile
from .job import Engine
from .memory import DeviceMemory, MemorySettings
from .model_shape import ModelShape
from .plan_warnings import warnings_of
from .step_time import CAS_MEASURED_REPLICAS, StepLoad, StepTimes, Streamed
from .workload import Workload

HIDDEN_WITHIN = 0.05  # a stream that lengthens the step by no more counts as hidden
_LARGEST_STEP = 1 << 20  # tokens; a threshold beyond is none
WAS_WITHIN = 0.01  # of the rate of the faster modes: engines are given mode "was" then


@dataclass(frozen=True)
class Thresholds:
    """Tokens of a step at which the better mode changes. None: never, up to a million tokens.

    ``cas_below``: CaS is predicted faster in decode steps of fewer sequences (its slots hold ``max_rows``; None: it has
    none). ``hidden_from_sequences``, ``hidden_from_prompt_tokens``: from here on the stream lengthens a decode step, or
    one of prompts alone, by at most 5 %.
    """

    cas_below: int | None
    hidden_from_sequences: int | None
    hidden_from_prompt_tokens: int | None


@dataclass(frozen=True)
class Scheme:
    """One way to run ``replicas`` GPUs. ``step_s`` and what follows from it are None where nothing fits.

    ``devices_per_unit``: 1, or a TP group's. ``sequences``: run together by a unit; ``batch``: those in a step, less
    when a step is bounded. ``times``: both modes (SiDP only). These are of the steady mix of an endless queue, also
    where a job is planned. ``tokens_per_s``: output tokens of the whole group, of a job over all of its time.
    """

    name: str
    kind: str  # "dp", "tp" or "sidp"
    num_resident: int | None
    devices_per_unit: int
    device: DeviceMemory
    group_kv_tokens: int
    batch: float
    mode: str | None
    step_s: float | None
    times: StepTimes | None
    tokens_per_s: float | None


@dataclass(frozen=True)
class Plan:
    """What ``sidp plan`` shows. ``residency``: SiDP with 0, 1, ... resident layers; ``best``: the one to run.

    With up to ``CAS_MEASURED_REPLICAS`` replicas each residency is in its faster mode, in a job at each step, with more
    in WaS alone. ``cas``: the fastest residency in CaS of more replicas, which was not measured and decides nothing;
    else None. ``job``: its parts, of which ``workload`` is the mean; of an endless queue there are none.

    ``mode``: what engines are to be given. ``was`` if one residency in WaS alone, which needs no mailbox, starts sooner
    and has nothing between a layer's linears, is within ``WAS_WITHIN`` of the fastest, and not behind plain DP if that
    one is ahead; it is ``best`` then. Else ``auto``.
    """

    shape: ModelShape
    gpu: GpuProfile
    replicas: int
    workload: Workload
    job: tuple[Workload, ...]
    settings: MemorySettings
    dp: Scheme
    tp: list[Scheme]
    residency: list[Scheme]
    best: Scheme
    mode: str
    cas: Scheme | None
    thresholds: Thresholds
    speedup: float | None  # of best over plain DP; None where one of the two does not fit
    kv_gain: float | None
    warnings: list[str]

    @property
    def sidp(self) -> Scheme:
        """Nothing resident but norms, embedding and head."""
        return self.residency[0]

    @property
    def resident_layers(self) -> list[int]:
        """Of the best residency: those that a pool is to keep."""
        count, cas = self.best.num_resident or 0, self.best.mode == _C.Mode.CAS.name
        return choose_resident_layers(self.shape.num_layers, count, self.replicas, cas=cas and self.replicas == 2)

    def rows(self) -> list[Scheme]:
        """The schemes of the tables: DP, TP, SiDP, the best residency where it is another, and CaS."""
        more = [] if self.best is self.sidp else [self.best]
        return [self.dp, *self.tp, self.sidp, *more, *([] if self.cas is None else [self.cas])]

    def as_dict(self) -> dict[str, Any]:
        """Plain values that ``json.dumps`` takes."""
        return {
            **asdict(self),
            "num_params": self.shape.num_params,
            "best_resident_layers": self.best.num_resident,
            "resident_layers": self.resident_layers,
        }


@dataclass(frozen=True)
class Planner:
    """``step_tokens``: the most tokens of a step. ``max_sequences``: the most that a replica runs; None: no bound.

    ``row_sizes``: what the engine pads the decode steps of a job to, ascending.
    """

    shape: ModelShape
    gpu: GpuProfile
    replicas: int
    settings: MemorySettings = field(default_factory=MemorySettings)
    step_tokens: int = 8192
    max_sequences: int | None = None
    row_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.replicas < 2:
            raise ConfigError(f"replicas is {self.replicas}; weights are shared among 2 or more")
        if list(self.row_sizes) != sorted({size for size in self.row_sizes if size > 0}):
            raise ConfigError(f"row_sizes {self.row_sizes} must be above 0 and ascend")
        if self.step_tokens < 1 or (self.max_sequences is not None and self.max_sequences < 1):
            raise ConfigError(
                f"step_tokens {self.step_tokens} and max_sequences {self.max_sequences} must be at least 1"
            )

    def plan(self, workload: Workload, *more: Workload) -> Plan:
        """One workload, or several that are worked off together, of which each has ``prompts``.

        ``CapacityError`` with the bytes that lack when a sequence fits under no scheme.
        """
        job = (workload, *more)
        workload = Workload.mean(job)
        if workload.prompts is None:
            job = ()
        dp = self._whole(workload, job, 1)
        degrees = [1 << bit for bit in range(1, self.replicas.bit_length()) if self._splits(1 << bit)]
        tp = [self._whole(workload, job, degree) for degree in degrees]
        with_cas, measured = bool(self.settings.max_rows), self.replicas <= CAS_MEASURED_REPLICAS
        planner = self if measured else self._was_alone
        residency = planner._residency(workload, job, with_cas and measured)
        cas = None
        if with_cas and not measured:
            asking = self._residency(workload, job, True, was=False)
            found = _fastest(asking)
            if found.mode == _C.Mode.CAS.name:
                cas = replace(found, name=f"{found.name} *")
        best, mode = planner._to_run(workload, job, residency, dp)
        longest = max((workload, *job), key=lambda part: part.context)
        if all(scheme.tokens_per_s is None for scheme in (dp, *tp, best)):
            self._raise_nothing_fits(longest)
        plan = Plan(
            shape=self.shape,
            gpu=self.gpu,
            replicas=self.replicas,
            workload=workload,
            job=tuple(job),
            settings=self.settings,
            dp=dp,
            tp=tp,
            residency=residency,
            best=best,
            mode=mode,
            cas=cas,
            thresholds=(self._was_alone if mode == "was" else self).thresholds(workload, best.num_resident or 0),
            speedup=_ratio(best.tokens_per_s, dp.tokens_per_s),
            kv_gain=_ratio(residency[0].group_kv_tokens, dp.group_kv_tokens),
            warnings=[],
        )
        return replace(plan, warnings=warnings_of(plan, longest, self.step_tokens))

    def _residency(
        self,
        workload: Workload,
        job: Sequence[Workload],
        cas: bool,
        *,
        was: bool = True,
        counts: Sequence[int] | None = None,
    ) -> list[Scheme]:
        """SiDP with 0, 1, ... resident layers, or ``counts``, each in the fastest of the modes that it may have."""
        counts = range(self.shape.num_layers) if counts is None else counts
        if job:
            return [self._sidp_job(workload, job, k, was=was, cas=cas) for k in counts]
        modes = [mode for mode, wanted in ((False, was), (True, cas)) if wanted]
        return [_fastest([self._sidp(workload, k, cas=mode) for mode in modes]) for k in counts]

    @property
    def _was_alone(self) -> Planner:
        return replace(self, settings=replace(self.settings, max_rows=0))

    def _to_run(
        self, workload: Workload, job: Sequence[Workload], residency: list[Scheme], dp: Scheme
    ) -> tuple[Scheme, str]:
        """The fastest, or one in WaS alone that is nearly as fast, and the engines' mode."""
        best = _fastest(residency)
        if not self.settings.max_rows:
            return best, "was"
        rate, dp_rate = best.tokens_per_s or 0.0, dp.tokens_per_s or 0.0
        enough = max((1 - WAS_WITHIN) * rate, dp_rate if dp_rate < rate else 0.0)
        # Of a job, whose plan takes time, those that may have enough: without a mailbox there is a little more room
        counts = [
            k for k, s in enumerate(residency) if not job or (s.tokens_per_s or 0.0) >= (1 - 3 * WAS_WITHIN) * rate
        ]
        found = _fastest(self._was_alone._residency(workload, job, False, counts=counts))
        if found.tokens_per_s is None or found.tokens_per_s < enough:
            return best, "auto"
        return replace(found, name=f"{found.name}, mode was"), "was"

    def thresholds(self, workload: Workload, num_resident: int) -> Thresholds:
        """Where the modes cross with ``num_resident`` resident layers."""
        streamed = self._streamed(num_resident)

        def times(decode: bool, tokens: int) -> StepTimes:
            load = StepLoad(tokens, self._mean_context(workload)) if decode else _prefill(tokens, workload)
            return step_time.step_times(self.gpu, self.shape, load, streamed, self.replicas)

        def hidden(decode: bool, tokens: int) -> bool:
            found = times(decode, tokens)
            return found.was_s <= (1 + HIDDEN_WITHIN) * found.work_s

        def was_wins(tokens: int) -> bool:
            found = times(True, tokens)
            return found.was_s <= found.cas_s

        cas_below = None
        if self.settings.max_rows:
            slower, beyond = _first(was_wins), self.settings.max_rows + 1
            cas_below = beyond if slower is None else min(slower, beyond)
        return Thresholds(cas_below, _first(partial(hidden, True)), _first(partial(hidden, False)))

    def _splits(self, degree: int) -> bool:
        """Whether vLLM splits the model so: whole heads, and KV heads either split or repeated evenly."""
        heads, kv_heads = self.shape.num_heads, self.shape.num_kv_heads
        return self.replicas % degree == heads % degree == 0 and (kv_heads % degree == 0 or degree % kv_heads == 0)

    def _streamed(self, num_resident: int) -> Streamed:
        return memory.streamed(memory.place(self.shape, self.replicas, num_resident, self.settings))

    @staticmethod
    def _mean_context(workload: Workload) -> float:
        return workload.prompt_tokens + workload.output_tokens / 2

    def _load(self, workload: Workload, sequences: int, most_rows: int | None = None) -> StepLoad:
        """The steady mix: while a sequence yields its tokens one a step, another's prompt is worked off meanwhile.

        ``most_rows``: of every step, prompts in chunks; None: ``step_tokens``.
        """
        prompt_rows = workload.prompt_tokens / workload.output_tokens
        most = self.step_tokens if most_rows is None else min(most_rows, self.step_tokens)
        batch = min(sequences, self.max_sequences or sequences, most / (1 + prompt_rows))
        return StepLoad(batch, self._mean_context(workload), batch * prompt_rows, workload.prompt_tokens)

    def _whole(self, workload: Workload, job: Sequence[Workload], degree: int) -> Scheme:
        device = memory.plain(self.shape, self.gpu.memory_bytes, workload.context, self.settings, degree)
        load = self._load(workload, device.sequences)
        seconds = step_time.tensor_parallel_s(self.gpu, self.shape, load, degree) if device.sequences else None
        name = (
            "plain DP"
            if degree == 1
            else f"TP{degree}" + (f" x DP{self.replicas // degree}" * (degree < self.replicas))
        )
        scheme = self._scheme(name, "dp" if degree == 1 else "tp", None, degree, device, load, None, seconds, None)
        if not job:
            return scheme
        step = partial(step_time.tensor_parallel_s, self.gpu, self.shape, degree=degree)
        return self._of_job(scheme, job, lambda load: (step(load), False))[0]

    def _sidp(self, workload: Workload, num_resident: int, *, cas: bool = False) -> Scheme:
        placement = memory.place(self.shape, self.replicas, num_resident, self.settings)
        device = memory.shared(self.shape, self.gpu.memory_bytes, workload.context, self.settings, placement)
        load = self._load(workload, device.sequences, self.settings.max_rows if cas else None)
        name = "SiDP" if num_resident == 0 else f"SiDP, {num_resident} resident"
        if device.sequences == 0:
            return self._scheme(name, "sidp", num_resident, 1, device, load, None, None, None)
        times = step_time.step_times(self.gpu, self.shape, load, memory.streamed(placement), self.replicas)
        seconds = times.cas_s if cas else times.was_s
        mode = (_C.Mode.CAS if cas else _C.Mode.WAS).name
        return self._scheme(name, "sidp", num_resident, 1, device, load, mode, seconds, times)

    def _sidp_job(
        self, workload: Workload, job: Sequence[Workload], num_resident: int, *, was: bool = True, cas: bool
    ) -> Scheme:
        """Each step in its faster mode, or without ``was`` in CaS where it may be; named after the one that most of the
        time is spent in."""
        streamed = self._streamed(num_resident)

        def step(load: StepLoad) -> tuple[float, bool]:
            times = step_time.step_times(self.gpu, self.shape, load, streamed, self.replicas)
            in_cas = cas and load.rows <= self.settings.max_rows and (not was or times.cas_s < times.was_s)
            return (times.cas_s if in_cas else times.was_s), in_cas

        scheme, mostly_cas = self._of_job(self._sidp(workload, num_resident), job, step)
        if not mostly_cas:
            return scheme
        return replace(self._sidp(workload, num_resident, cas=True), tokens_per_s=scheme.tokens_per_s)

    def _of_job(
        self, scheme: Scheme, job: Sequence[Workload], step: Callable[[StepLoad], tuple[float, bool]]
    ) -> tuple[Scheme, bool]:
        """The scheme at the rate of the job, and whether most of its time is in CaS."""
        degree = scheme.devices_per_unit
        kv = memory.KvCache(self.shape, max(p.context for p in job), self.settings.block_tokens, degree)
        room = scheme.device.kv_room_bytes if scheme.device.fits else 0
        if kv.sequence_bytes(kv.context) > room:
            return replace(scheme, batch=0.0, mode=None, step_s=None, times=None, tokens_per_s=None), False
        table = memory.sequence_bytes_by_tokens(kv)
        engine = Engine(table, room, step, self.step_tokens, self.max_sequences, self.row_sizes)
        found = engine.run(job, self.replicas // degree)
        tokens = sum((part.prompts or 0) * part.output_tokens for part in job)
        return replace(scheme, tokens_per_s=tokens / found.seconds), 2 * found.cas_seconds > found.seconds

    def _scheme(
        self,
        name: str,
        kind: str,
        num_resident: int | None,
        degree: int,
        device: DeviceMemory,
        load: StepLoad,
        mode: str | None,
        seconds: float | None,
        times: StepTimes | None,
    ) -> Scheme:
        units = self.replicas // degree
        rate = None if seconds is None else units * load.decode_rows / seconds
        kv_tokens = units * device.kv_tokens if device.fits else 0
        return Scheme(name, kind, num_resident, degree, device, kv_tokens, load.decode_rows, mode, seconds, times, rate)

    def _raise_nothing_fits(self, workload: Workload) -> None:
        devices = [planner._sidp(workload, 0).device for planner in (self, self._was_alone)]
        kv = memory.KvCache(self.shape, workload.context, self.settings.block_tokens).sequence_bytes(workload.context)
        lacking = min(kv - device.kv_room_bytes + device.shortfall_bytes for device in devices)
        raise CapacityError(
            f"{self.shape.name} on {self.replicas} x {self.gpu.name}: no scheme has room for one sequence of "
            f"{workload.context} tokens ({kv / 2**30:.2f} GiB of KV); SiDP lacks {lacking / 2**30:.2f} GiB a device. "
            "Take more replicas, shorter sequences, or a smaller model",
            num_bytes=lacking,
        )


def _prefill(tokens: int, workload: Workload) -> StepLoad:
    return StepLoad(0, 0, tokens, workload.prompt_tokens)


def _fastest(schemes: list[Scheme]) -> Scheme:
    return max(schemes, key=lambda scheme: (scheme.tokens_per_s or 0.0, -(scheme.num_resident or 0)))


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _first(holds: Callable[[int], bool]) -> int | None:
    """Fewest tokens from which on it holds; it holds for all above the first."""
    if not holds(_LARGEST_STEP):
        return None
    low, high = 1, _LARGEST_STEP
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
