"""How long an engine takes for a job that ends: vLLM's scheduler, step by step, with predicted steps.

What an endless queue does not show: how many sequences run at a time when each takes KV only as it grows, what is
preempted and computed again, and a tail of ever fewer sequences.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .step_time import StepLoad
from .workload import Workload

MOST_PROMPTS = 512  # of a replica; a longer job is planned as one of so many, so that its tail counts for too much
STRIDE = 32  # decode steps that are taken as one of their mean, at most; nothing changes between them but contexts


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
    tokens: int
    steps: int
    preemptions: int

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


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

    def run(self, job: Sequence[Workload], replicas: int = 1) -> JobTime | None:
        """One of ``replicas`` with as many prompts of each part of ``job``. None: a sequence does not fit."""
        if any(self.kv_bytes[part.context] > self.room for part in job):
            return None
        return _Run(self, _mixed(job, replicas)).to_the_end()

    def padded(self, sequences: int) -> int:
        return next((size for size in self.row_sizes if size >= sequences), sequences)


def _mixed(job: Sequence[Workload], replicas: int) -> deque[_Sequence]:
    """The parts at even distances among each other."""
    counts = [-(-(part.prompts or 0) // replicas) for part in job]
    if (total := sum(counts)) > MOST_PROMPTS:
        counts = [max(1, round(count * MOST_PROMPTS / total)) for count in counts]
    order = sorted(((i + 0.5) / count, number) for number, count in enumerate(counts) for i in range(count))
    return deque(_Sequence(job[number].prompt_tokens, job[number].output_tokens) for _, number in order)


@dataclass
class _Run:
    engine: Engine
    waiting: deque[_Sequence]
    running: list[_Sequence] = field(default_factory=list)
    used: int = 0

    def to_the_end(self) -> JobTime:
        seconds = cas_seconds = 0.0
        steps = preemptions = 0
        tokens = sum(sequence.left for sequence in self.waiting)
        while self.waiting or self.running:
            preemptions += self._make_room()
            ready, load = self._admit()
            count = 1 if load.prefill_rows else self._steps_alike()
            if not load.prefill_rows:
                load = self._decode(count)
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
        """For one more token of each that runs: the last to come are preempted, and come first again."""
        preempted = 0
        while not self._fit(1):
            if self.waiting and self.waiting[0].filled:  # in the midst of its prompt
                self.used -= self.engine.kv_bytes[self.waiting[0].filled]
                self.waiting[0].filled = 0
                continue
            last = self.running.pop()
            self.used -= self.engine.kv_bytes[last.context - 1]
            self.waiting.appendleft(last)
            preempted += 1
        return preempted

    def _admit(self) -> tuple[list[_Sequence], StepLoad]:
        """Takes prompts into the step as far as there is room; those that it finishes, and the step's load."""
        kv_bytes, room = self.engine.kv_bytes, self.engine.room - (self._grown(1) if self.waiting else 0)
        most = min(self.engine.max_sequences or self.engine.step_tokens, self.engine.step_tokens)
        budget = self.engine.step_tokens - len(self.running)
        ready: list[_Sequence] = []
        rows = of_prompts = 0
        while self.waiting and budget > 0 and len(self.running) + len(ready) < most:
            first = self.waiting[0]
            chunk = min(budget, first.context - first.filled)
            more = kv_bytes[first.filled + chunk] - kv_bytes[first.filled]
            if self.used + more > room:
                break
            self.used += more
            first.filled += chunk
            budget -= chunk
            rows += chunk
            of_prompts += chunk * first.context
            if first.filled == first.context:
                ready.append(self.waiting.popleft())
        decode = self._decode(1, padded=False)
        mean_prompt = of_prompts / rows if rows else 1.0
        return ready, StepLoad(decode.decode_rows, decode.context, rows, mean_prompt)

    def _decode(self, count: int, *, padded: bool = True) -> StepLoad:
        """The mean of the next ``count`` steps of those that run."""
        number = len(self.running)
        rows = self.engine.padded(number) if padded else number
        tokens = sum([s.context for s in self.running]) + number * count / 2
        return StepLoad(rows, tokens / rows if rows else 0.0)

    def _steps_alike(self) -> int:
        count = min(STRIDE, *[s.left for s in self.running])
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
