"""How long an engine takes for a job that ends: vLLM's scheduler, step by step, with predicted steps.

What an endless queue does not show: how many sequences run at a time when each takes KV only as it grows, what is
preempted and computed again, and a tail of ever fewer sequences.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..errors import ConfigError
from .step_time import StepLoad
from .workload import Workload

MOST_PROMPTS = 512  # of a replica that are followed; a longer job is drawn out from this one and one of half as many
STRIDE = 32  # decode steps that are taken as one of their mean, at most; nothing changes between them but contexts
STRIDES = 64  # or so many of the longest answer
MOST_ITERATIONS = 50_000


@dataclass
class _Sequence:
    context: int  # tokens of its prompt, and what it has yielded; the last one is in the KV cache a step later
    left: int  # tokens that it is still to yield
    filled: int = 0  # of `context`, before it runs


@dataclass(frozen=True)
class JobTime:
    """``seconds`` for all of it, ``cas_seconds`` of them in CaS; ``tokens`` yielded, in ``steps``."""

    seconds: float
    cas_seconds: float
    tokens: float
    steps: float
    preemptions: float


@dataclass(frozen=True)
class Engine:
    """``kv_bytes``: of a sequence, by its tokens; ``room``: for all of them. ``step``: seconds, and whether in CaS.

    ``step_tokens`` and ``max_sequences`` (None: no bound) bound a step, whose prompts come in chunks. Steps without
    prompts are padded to the next of ``row_sizes``, ascending, as CUDA graphs are.
    """

    kv_bytes: Sequence[int]
    room: int
    step: Callable[[StepLoad], tuple[float, bool]]
    step_tokens: int
    max_sequences: int | None = None
    row_sizes: tuple[int, ...] = ()

    def run(self, job: Sequence[Workload], replicas: int = 1) -> JobTime:
        """The one of ``replicas`` that has the most prompts of ``job``.

        ``ConfigError``: a part without ``prompts``, a sequence beyond the room, or too many steps to be followed.
        """
        if any(part.prompts is None for part in job):
            raise ConfigError("a job has an end: each of its workloads needs prompts=")
        if (longest := max(self.kv_bytes[part.context] for part in job)) > self.room:
            raise ConfigError(f"a sequence needs {longest} bytes of KV, and there is room for {self.room}")
        counts = [-(-(part.prompts or 0) // replicas) for part in job]
        whole, half = (scaled(counts, most) for most in (MOST_PROMPTS, MOST_PROMPTS // 2))
        found = self._follow(job, whole)
        if whole == counts:
            return found
        less = self._follow(job, half)
        tokens = sum(count * part.output_tokens for count, part in zip(counts, job, strict=True))
        times = (tokens - found.tokens) / (found.tokens - less.tokens)
        return JobTime(*(b + times * (b - a) for a, b in zip(vars(less).values(), vars(found).values(), strict=True)))

    def padding(self, sequences: int) -> int:
        return next((size for size in self.row_sizes if size >= sequences), sequences) - sequences

    def _follow(self, job: Sequence[Workload], counts: Sequence[int]) -> JobTime:
        return _Run(self, _mixed(job, counts), max(STRIDE, max(p.output_tokens for p in job) // STRIDES)).to_the_end()


def scaled(counts: Sequence[int], most: int) -> list[int]:
    """As many together as ``most``, but of each some: rare ones are what a tail is made of."""
    share = min(1.0, most / sum(counts))
    return [max(round(count * share), min(count, 8)) for count in counts]


def _mixed(job: Sequence[Workload], counts: Sequence[int]) -> deque[_Sequence]:
    """The parts at even distances among each other."""
    order = sorted(((i + 0.5) / count, number) for number, count in enumerate(counts) for i in range(count))
    return deque(_Sequence(job[number].prompt_tokens, job[number].output_tokens) for _, number in order)


@dataclass
class _Run:
    engine: Engine
    waiting: deque[_Sequence]
    stride: int = STRIDE
    running: list[_Sequence] = field(default_factory=list)
    used: int = 0

    def to_the_end(self) -> JobTime:
        seconds = cas_seconds = 0.0
        steps = preemptions = iterations = 0
        prompts, tokens = len(self.waiting), sum(sequence.left for sequence in self.waiting)
        while self.waiting or self.running:
            if (iterations := iterations + 1) > MOST_ITERATIONS:
                raise ConfigError(
                    f"a job of {prompts} prompts and {tokens} tokens a replica takes more than {MOST_ITERATIONS} steps "
                    "to be followed: fewer prompts, or more step_tokens"
                )
            preemptions += self._make_room()
            ready, load = self._admit()
            count = 1
            if not load.prefill_rows:
                count = self._steps_alike()
                load = StepLoad(*self._decode(count), padding_rows=self.engine.padding(len(self.running)))
            step_s, is_cas = self.engine.step(load)
            seconds += count * step_s
            cas_seconds += count * step_s * is_cas
            steps += count
            self._yield(count, ready)
        return JobTime(seconds, cas_seconds, tokens, steps, preemptions)

    def _grown(self, count: int) -> int:
        """Bytes that the running sequences take more after ``count`` steps."""
        kv_bytes = self.engine.kv_bytes
        return sum([kv_bytes[s.context - 1 + count] - kv_bytes[s.context - 1] for s in self.running])

    def _fit(self, count: int) -> bool:
        """Whether they can make so many steps; first by what they take more at most."""
        room = self.engine.room - self.used
        return len(self.running) * self.engine.kv_bytes[count] <= room or self._grown(count) <= room

    def _make_room(self) -> int:
        """For one more token of each that runs: the last to come are preempted, and come first again. How many."""
        preempted = 0
        while not self._fit(1):
            if self.waiting and self.waiting[0].filled:  # in the midst of its prompt
                self.used -= self.engine.kv_bytes[self.waiting[0].filled]
                self.waiting[0].filled = 0
                preempted += 1
                continue
            last = self.running.pop()
            self.used -= self.engine.kv_bytes[last.context - 1]
            self.waiting.appendleft(last)
            preempted += 1
        return preempted

    def _admit(self) -> tuple[list[_Sequence], StepLoad]:
        """Takes prompts into the step as far as all of each fits; those that it finishes, and the step's load.

        vLLM takes none in a step that preempts. Nor does this: what was preempted comes first, and does not fit.
        """
        kv_bytes, room = self.engine.kv_bytes, self.engine.room - (self._grown(1) if self.waiting else 0)
        most = min(self.engine.max_sequences or self.engine.step_tokens, self.engine.step_tokens)
        budget = self.engine.step_tokens - len(self.running)
        ready: list[_Sequence] = []
        rows = of_prompts = 0
        while self.waiting and budget > 0 and len(self.running) + len(ready) < most:
            first = self.waiting[0]
            chunk = min(budget, first.context - first.filled)
            if self.used + kv_bytes[first.context] - kv_bytes[first.filled] > room:
                break
            self.used += kv_bytes[first.filled + chunk] - kv_bytes[first.filled]
            first.filled += chunk
            budget -= chunk
            rows += chunk
            of_prompts += chunk * first.context
            if first.filled == first.context:
                ready.append(self.waiting.popleft())
        number, context = self._decode(1)
        return ready, StepLoad(number, context, rows, of_prompts / rows if rows else 1.0)

    def _decode(self, count: int) -> tuple[int, float]:
        """Those that run, and the mean of what they attend to in the next ``count`` steps."""
        number = len(self.running)
        return number, sum([s.context for s in self.running]) / number + count / 2 if number else 0.0

    def _steps_alike(self) -> int:
        count = min(self.stride, *[s.left for s in self.running])
        while count > 1 and not self._fit(count):
            count //= 2
        return count

    def _yield(self, count: int, ready: list[_Sequence]) -> None:
        """Each that runs yields ``count`` tokens, each whose prompt is done its first."""
        kv_bytes = self.engine.kv_bytes
        self.used += self._grown(count)
        for sequence, made in [*((s, count) for s in self.running), *((s, 1) for s in ready)]:
            sequence.context += made
            sequence.left -= made
            sequence.filled = 0
            if not sequence.left:
                self.used -= kv_bytes[sequence.context - 1]
        self.running = [s for s in [*self.running, *ready] if s.left]
