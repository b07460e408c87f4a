"""The launcher with real processes that pretend to be replicas: they echo, die, hang or lie on command."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_replica import fake_replica

from sidp_runtime import _C
from sidp_runtime.errors import CheckpointError, PeerDeadError, SidpError, UnhelpfulWarning
from sidp_runtime.job import protocol, replica_process, replicas
from sidp_runtime.job.launcher import BATCH_FAILURES, JobInterrupted, Launcher
from sidp_runtime.job.prompts import Batch, Request, cut

pytestmark = [pytest.mark.unit, pytest.mark.timeout(90)]

REQUESTS = [Request(f"p{i}", i + 1, (i, i + 1)) for i in range(23)]
BATCHES = cut(REQUESTS, 4)


@pytest.fixture(scope="module", autouse=True)
def _fork_server() -> None:
    """Imports once what every fake needs, so that they start in milliseconds."""
    replicas.start_fork_server(["sidp_runtime.job.launcher", "pytest"])


class Job:
    """A launcher on the fake replicas, and all that it said."""

    def __init__(
        self, tmp_path: Path, world_size: int = 3, batches: list[Batch] = BATCHES, most_held: int = 1, **fake: Any
    ) -> None:
        self.log = tmp_path / "starts"
        self.events: list[tuple[Any, ...]] = []
        self.results: dict[int, list[list[int]]] = {}
        self.by_rank: dict[int, int] = {}
        self.on_event: Callable[..., None] = lambda *values: None
        self.batches = batches
        self.launcher = Launcher(
            world_size,
            {"fake": fake, "log": str(self.log)},
            batches,
            target=fake_replica,
            max_new_tokens=2,
            deadline_ms=1000,
            silence_ms=4000,
            on_result=self._result,
            on_event=self._event,
            most_held=most_held,
            make_store=lambda: (None, "", 0),
            close_s=1.0,
        )

    def _result(self, rank: int, batch: int, sequences: list[list[int]], finish: list[str]) -> None:
        assert batch not in self.results
        self.results[batch] = sequences
        self.by_rank[rank] = self.by_rank.get(rank, 0) + 1

    def _event(self, *values: Any) -> None:
        self.events.append(values)
        self.on_event(*values)

    def run(self) -> list[replicas.Replica]:
        return self.launcher.run()

    def check_complete(self) -> None:
        expected = {b.index: [[2 * t for t in r.input_ids] for r in b.requests] for b in self.batches}
        assert self.results == expected

    def said(self, name: str) -> list[tuple[Any, ...]]:
        return [event[1:] for event in self.events if event[0] == name]

    def starts(self) -> list[tuple[int, int, str]]:
        lines = [line.split() for line in self.log.read_text().splitlines()]
        return [(int(rank), int(pid), token) for rank, pid, token in lines]

    def check_nobody_is_left(self) -> None:
        limit = time.monotonic() + 5
        for _, pid, _ in self.starts():
            while _runs(pid):
                assert time.monotonic() < limit, f"process {pid} is still there"
                time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_all_batches_once_and_all_closed(tmp_path: Path) -> None:
    job = Job(tmp_path)
    found = job.run()
    job.check_complete()
    job.check_nobody_is_left()
    assert [r.words for r in found] == ["", "", ""]
    assert [r.process.exitcode for r in found] == [0, 0, 0]
    assert [r.stats for r in found] == [{"steps": {"was": 1}}] * 3
    assert [r.memory for r in found] == [{"pooled_bytes": 2}] * 3
    assert sum(r.batches for r in found) == len(BATCHES)
    assert sum(r.tokens for r in found) == 46
    assert len(job.said("batch_done")) == len(BATCHES)
    assert job.said("ready") == [([r.pid for r in found],)]
    assert job.said("loading")[-1][1] in (10, 20, 30)
    assert not job.said("warning")


def test_a_replicas_own_warnings_are_the_jobs(tmp_path: Path) -> None:
    job = Job(tmp_path, ready={"0": "warn sharing saves nothing", "1": "warn sharing saves nothing", "2": "warn other"})
    job.run()
    job.check_complete()
    said = sorted(text for (text,) in job.said("warning"))
    assert [text.partition(": ")[2] for text in said] == ["sharing saves nothing", "other"]


def test_other_warnings_stay_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *where, **options: shown.append(str(message)))
    launcher, replica = multiprocessing.Pipe()
    replica_process._send_warnings(replica)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("ours", UnhelpfulWarning, stacklevel=1)
        warnings.warn("another package's", UserWarning, stacklevel=1)
    assert shown == ["another package's"]
    assert protocol.receive(launcher, protocol.FROM_REPLICA)["text"] == "ours"
    assert not launcher.poll()


def test_a_fast_replica_takes_more(tmp_path: Path) -> None:
    job = Job(tmp_path, world_size=2, batch={"0": "slow"})
    job.run()
    job.check_complete()
    assert job.by_rank[1] > job.by_rank[0]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("die", "killed by SIGKILL"),
        ("exit 9", "exit code 9"),
        ("hang", "made no progress for 4 s"),
        ("stop", "made no progress for 4 s"),
        ("error RemoteOpError", "reports RemoteOpError: the words of the replica"),
        ("lie", "answered batch"),
        ("nonsense", "sent nonsense"),
        ("half", "stopped in the middle of a message"),
    ],
)
def test_a_lost_replica_loses_nothing(tmp_path: Path, what: str, words: str) -> None:
    job = Job(tmp_path, batch={"0": what})
    found = job.run()
    job.check_complete()
    job.check_nobody_is_left()
    assert words in found[0].words
    assert [rank for rank, _ in job.said("replica_died")] == [0]
    assert "with its batch 0" in job.said("warning")[0][0]
    assert not job.by_rank.get(0)
    assert [bool(r.stats) for r in found] == [False, True, True]


def test_all_that_a_lost_replica_held_goes_to_the_others(tmp_path: Path) -> None:
    batches = cut(REQUESTS[:14], 1)
    job = Job(tmp_path, world_size=2, batches=batches, most_held=5, batch={"0:2": "hang", "1": "slow"})
    job.run()
    job.check_complete()
    assert "with its batch 2 and 4 more" in job.said("warning")[0][0]  # 0 and 1 were answered, and replaced
    assert job.by_rank == {0: 2, 1: 12}


def test_setting_up_is_progress_for_a_bounded_time() -> None:
    mine, theirs = multiprocessing.Pipe()
    heard = 0
    with replica_process.starting(theirs, limit_s=1.0, interval_s=0.1):
        while mine.poll(0.6):
            assert protocol.receive(mine, protocol.FROM_REPLICA) == {"type": "starting"}
            heard += 1
    assert 2 <= heard <= 10
    with replica_process.starting(theirs, limit_s=60, interval_s=0.1):
        assert mine.poll(5)
    while mine.poll(0):
        mine.recv_bytes()
    assert not mine.poll(0.3)


def test_progress_keeps_a_slow_replica_alive(tmp_path: Path) -> None:
    job = Job(tmp_path, world_size=1, batches=BATCHES[:1], batch={"0": "slow"})
    job.launcher._silence_s = 2.0  # the batch takes longer
    job.run()
    job.check_complete()


def test_an_idle_replica_takes_over_at_the_end(tmp_path: Path) -> None:
    """The last batch is in the hands of one that dies while the others have nothing left to do."""
    job = Job(tmp_path, world_size=2, batches=BATCHES[:2], batch={"1": "die"})
    job.run()
    job.check_complete()
    assert job.by_rank == {0: 2}


def test_killed_at_a_chosen_moment(tmp_path: Path) -> None:
    job = Job(tmp_path, batch={"0": "slow", "1": "slow", "2": "slow"})
    killed = []

    def kill(name: str, *values: Any) -> None:
        if name == "batch_done" and not killed:
            victim = (values[1] + 1) % 3
            killed.append(victim)
            os.kill(job.said("ready")[0][0][victim], signal.SIGKILL)

    job.on_event = kill
    job.run()
    job.check_complete()
    assert [rank for rank, _ in job.said("replica_died")] == killed


def test_all_dead_is_an_error_that_counts_what_is_written(tmp_path: Path) -> None:
    job = Job(tmp_path, world_size=2, batch={"0:1": "die", "1:1": "die", "0:2": "die", "1:2": "die"})
    with pytest.raises(PeerDeadError, match=r"no replica is left of 2; .* SIGKILL .* of 6 batches are written"):
        job.run()
    assert 0 < len(job.results) < len(BATCHES)
    job.check_nobody_is_left()


def test_a_batch_that_kills_is_not_tried_on_everybody(tmp_path: Path) -> None:
    world_size = BATCH_FAILURES + 1
    job = Job(tmp_path, world_size=world_size, batch={f"{rank}:0": "exit 5" for rank in range(world_size)})
    with pytest.raises(PeerDeadError, match=r"batch 0 \(prompts 'p0', 'p1', 'p2', 'p3'\) took 3 replicas down"):
        job.run()
    job.check_nobody_is_left()


def test_start_is_tried_again_with_a_new_token(tmp_path: Path) -> None:
    job = Job(tmp_path, ready={"1": "die"}, tries=2)
    job.run()
    job.check_complete()
    assert job.launcher.restarts == 2
    assert [attempt for (attempt,) in job.said("starting")] == [1, 2, 3]
    assert "replica 1 killed by SIGKILL" in job.said("warning")[0][0]
    assert len({token for _, _, token in job.starts()}) == 3
    job.check_nobody_is_left()


@pytest.mark.parametrize("what", ["die", "hang", "error DeadlineError", "error PeerDeadError"])
def test_start_is_given_up(tmp_path: Path, what: str) -> None:
    job = Job(tmp_path, ready={"2": what})
    job.launcher._silence_s = 3.0
    with pytest.raises(PeerDeadError, match="group of 3 died 3 times before it was ready; the last time replica 2"):
        job.run()
    assert not job.results
    job.check_nobody_is_left()


@pytest.mark.parametrize(
    ("name", "kind"), [("CheckpointError", CheckpointError), ("KeyError", SidpError), ("errors", SidpError)]
)
def test_an_error_that_would_come_again_is_raised_at_once(tmp_path: Path, name: str, kind: type[SidpError]) -> None:
    job = Job(tmp_path, ready={"1": f"error {name}"})
    with pytest.raises(kind, match=r"replica 1 reports.*the words of the replica") as caught:
        job.run()
    assert type(caught.value) is kind
    assert job.launcher.restarts == 0
    job.check_nobody_is_left()


def test_death_before_the_closing_figures(tmp_path: Path) -> None:
    job = Job(tmp_path, stats={"0": "die", "1": "hang"})
    found = job.run()
    job.check_complete()
    assert [bool(r.stats) for r in found] == [False, False, True]
    texts = [text for (text,) in job.said("warning")]
    assert any("of replica 0: it killed by SIGKILL" in text for text in texts)
    assert any("of replica 1: it gave none for 1000 ms" in text for text in texts)
    job.check_nobody_is_left()


def test_a_replica_that_does_not_close_is_ended(tmp_path: Path) -> None:
    job = Job(tmp_path, close={"1": "hang", "2": "stop"})
    begin = time.monotonic()
    job.run()
    assert time.monotonic() - begin < 20
    job.check_complete()
    job.check_nobody_is_left()


def test_names_of_shared_memory_are_removed_after_every_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[tuple[str, int]] = []
    monkeypatch.setattr(_C, "unlink_segments", lambda token, world_size: removed.append((token, world_size)))
    job = Job(tmp_path, ready={"1": "die"}, tries=1)
    job.run()
    tokens = list(dict.fromkeys(token for _, _, token in job.starts()))
    assert removed == [(token, 3) for token in tokens]


def test_an_error_of_the_writer_ends_the_group(tmp_path: Path) -> None:
    job = Job(tmp_path)

    def full(*values: Any) -> None:
        raise SidpError("disk full")

    job.launcher._on_result = full
    with pytest.raises(SidpError, match="disk full"):
        job.run()
    job.check_nobody_is_left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_close_the_group(tmp_path: Path, number: signal.Signals) -> None:
    job = Job(tmp_path, batch={"0": "slow", "1": "slow", "2": "slow"})
    before = signal.getsignal(number)

    def interrupt(name: str, *values: Any) -> None:
        if name == "batch_done" and len(job.results) == 1:  # a second signal would not wait
            os.kill(os.getpid(), number)

    job.on_event = interrupt
    with pytest.raises(JobInterrupted) as caught:
        job.run()
    assert caught.value.signum == number
    assert 0 < len(job.results) < len(BATCHES)
    assert signal.getsignal(number) is before
    job.check_nobody_is_left()


def test_outside_the_main_thread(tmp_path: Path) -> None:
    job = Job(tmp_path)
    thread = threading.Thread(target=job.run)
    thread.start()
    thread.join(60)
    job.check_complete()


def test_nothing_outlives_a_killed_launcher(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            from pathlib import Path
            sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
            import test_job_launcher as t
            if __name__ == "__main__":
                job = t.Job(Path(sys.argv[2]), batch={"0": "slow", "1": "slow"}, world_size=2)
                job.on_event = lambda name, *v: print(name, flush=True)
                job.run()
            """
        )
    )
    command = [sys.executable, str(script), str(Path(__file__).parent), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "batch_done":
                break
        process.kill()
    job = Job(tmp_path)
    assert len(job.starts()) == 2
    job.check_nobody_is_left()


def test_messages_are_checked() -> None:
    known = {"a": frozenset({"x"})}

    class One:
        def __init__(self, data: bytes) -> None:
            self.data = data

        def recv_bytes(self) -> bytes:
            return self.data

    def received(value: object) -> protocol.Message:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        return protocol.receive(One(data), known)  # type: ignore[arg-type]

    assert received({"type": "a", "x": 1}) == {"type": "a", "x": 1}
    for wrong in (b"\x80", {"type": "b"}, {"x": 1}, [1], 3, {"type": ["a"]}):
        with pytest.raises(SidpError, match="not of this protocol"):
            received(wrong)
    with pytest.raises(SidpError, match="lacks x"):
        received({"type": "a"})
