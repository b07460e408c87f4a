"""The report: figures add up, survive JSON, and a pool that did nothing is an error."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sidp_runtime.errors import ConfigError, UsageError
from sidp_runtime.job.display import Display
from sidp_runtime.job.replicas import Replica
from sidp_runtime.job.report import JobReport, RankReport, bytes_text, check_pool_was_used, rank_report

pytestmark = pytest.mark.unit

MIB = 1 << 20
MEMORY = {
    "pooled_bytes": 100 * MIB,
    "owned_bytes": 50 * MIB,
    "pool_resident_bytes": 4 * MIB,
    "ring_bytes": 6 * MIB,
    "pool_pss": 51 * MIB,
    "ring_rss": 5 * MIB,
    "resident_rss": 4 * MIB,
}
STATS = {
    "steps": {"was": 3, "cas": 2},
    "bytes_by_peer": [0, 70 * MIB],
    "requests_by_peer": [0, 12],
    "served_by_peer": [0, 9],
    "fallbacks": 1,
}


def replica(**values: Any) -> Replica:
    return Replica(0, None, None, 77, 0.0, **values)  # type: ignore[arg-type]


def rank(
    was: int = 0, cas: int = 0, moved: int = 0, requests: int = 0, fallbacks: int = 0, streams: bool = True
) -> RankReport:
    stats = {
        "steps": {"was": was, "cas": cas},
        "bytes_by_peer": [0, moved],
        "requests_by_peer": [0, requests],
        "fallbacks": fallbacks,
    }
    memory = MEMORY if streams else {**MEMORY, "owned_bytes": 96 * MIB}
    return rank_report(replica(stats=stats, memory=memory))


def report(*ranks: RankReport, **values: Any) -> JobReport:
    defaults: dict[str, Any] = {
        "model": "m",
        "out": "o.jsonl",
        "world_size": 2,
        "mode": "auto",
        "dtype": "float32",
        "batch_size": 4,
        "threads_per_replica": 1,
        "prompts": 9,
        "prompts_skipped": 2,
        "prompt_tokens": 50,
        "new_tokens": 30,
        "start_s": 1.0,
        "work_s": 2.0,
        "restarts": 0,
        "ranks": list(ranks),
        "warnings": [],
    }
    return JobReport(**{**defaults, **values})


def test_figures_of_a_rank() -> None:
    found = rank_report(replica(memory=MEMORY, stats=STATS, load={"bytes_read": 9, "seconds": 0.5}, tokens=11))
    assert found.full_bytes == 100 * MIB
    assert found.computed_bytes == 60 * MIB
    assert found.measured_bytes == 60 * MIB
    assert found.kv_bytes_gained == 40 * MIB
    assert (found.fallbacks, found.tokens, found.pid) == (1, 11, 77)


def test_a_rank_that_died_before_it_could_say() -> None:
    found = rank_report(replica(words="killed by SIGKILL"))
    assert found.full_bytes is found.kv_bytes_gained is found.fallbacks is None
    assert found.fate == "killed by SIGKILL"


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report(rank_report(replica(memory=MEMORY, stats=STATS))).write(path)
    document = json.loads(path.read_text())
    assert document["tokens_per_s"] == 15.0
    assert document["ranks"][0]["bytes_by_peer"] == [0, 70 * MIB]
    assert document["ranks"][0]["stats"] == STATS
    with pytest.raises(ConfigError, match="cannot be written"):
        report().write(tmp_path / "absent" / "report.json")


def test_tables() -> None:
    out = io.StringIO()
    alive = rank_report(replica(memory=MEMORY, stats=STATS, load={"bytes_read": 30 * MIB}))
    report(alive, rank_report(replica(words="killed by SIGKILL"))).render(Console(file=out, width=80))
    text = out.getvalue()
    for words in ("7 prompts", "2 were there already", "15.0 tokens/s", "100.0 MiB", "40.0 MiB", "was 3", "cas 2"):
        assert words in text
    for words in ("70.0 MiB", "12", "?", "killed by SIGKILL", "30.0 MiB"):
        assert words in text
    assert max(map(len, text.splitlines()[2:])) <= 110


def test_nothing_ran() -> None:
    out = io.StringIO()
    nothing = report(prompts_skipped=9, work_s=0.0, new_tokens=0)
    nothing.render(Console(file=out))
    assert "0 prompts" in out.getvalue()
    assert nothing.tokens_per_s == 0


@pytest.mark.parametrize(
    "ranks",
    [
        [rank(was=5), rank(was=5)],
        [rank(was=5, moved=100), rank(was=5)],
        [rank(cas=5, moved=100), rank(cas=5, moved=100)],  # a ring filled once, and no request
        [rank(was=5, streams=False), rank()],
    ],
)
def test_a_pool_that_did_nothing_is_an_error(ranks: list[RankReport]) -> None:
    with pytest.raises(UsageError, match="were not shared"):
        check_pool_was_used(ranks)


@pytest.mark.parametrize(
    "ranks",
    [
        [rank(was=5)],  # alone, there is nothing to share
        [rank(was=5, moved=100), rank(was=5, moved=100)],
        [rank(cas=5, requests=9), rank(cas=5, requests=9)],
        [rank(was=5, moved=100), rank()],  # one never had a batch
        [rank(was=5, moved=100), rank(was=5, streams=False)],  # one owns all
        [rank(cas=5, moved=100, fallbacks=3), rank_report(replica(words="killed"))],
        [rank_report(replica(words="killed")), rank()],
        [],
    ],
)
def test_a_pool_that_was_used_is_none(ranks: list[RankReport]) -> None:
    check_pool_was_used(ranks)


def test_sizes() -> None:
    assert bytes_text(None) == "?"
    assert bytes_text(3 * MIB) == "3.0 MiB"
    assert bytes_text(1536 * MIB) == "1.50 GiB"


@pytest.mark.parametrize("terminal", [False, True])
def test_display_takes_every_event(terminal: bool) -> None:
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=terminal, width=100)) as show:
        show("planned", 8, 2)
        show("starting", 1)
        show("loading", 5 * MIB, 10 * MIB)
        show("starting", 2)
        show("ready", [1, 2])
        show("batch_done", 0, 1)
        show("progress", 6, 20)
        show("replica_died", 0, "killed")
        show("warning", "replica 0 [died]")
        show("notice", "cut off 3 bytes")
    assert "replica 0 [died]" in out.getvalue()
    assert "cut off 3 bytes" in out.getvalue()
