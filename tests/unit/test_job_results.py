"""The results file: what is in it stays, a second start goes on, and nothing foreign is touched."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sidp_runtime.errors import ConfigError
from sidp_runtime.job import results
from sidp_runtime.job.results import Result, ResultsWriter, header_path

pytestmark = pytest.mark.unit

IDS = ["a", "b", "c", "d"]
SETTINGS = {"batch_size": 4, "model": "m" * 64, "eos_token_ids": [2]}


def result(identity: str, text: str = "né\n") -> Result:
    return Result(identity, text, [1, 2], "stop", 0, 5)


def opened(
    path: Path, overwrite: bool = False, ids: list[str] = IDS, settings: dict[str, object] = SETTINGS
) -> ResultsWriter:
    return ResultsWriter(path, settings, ids, overwrite=overwrite)


def ids_in(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    path = tmp_path / "out.jsonl"
    with opened(path) as writer:
        writer.append([result("a"), result("b")])
    return path


def test_lines_are_what_was_said(out: Path) -> None:
    first = json.loads(out.read_text().splitlines()[0])
    assert first == {
        "id": "a",
        "text": "né\n",
        "token_ids": [1, 2],
        "finish_reason": "stop",
        "replica": 0,
        "prompt_tokens": 5,
    }
    assert json.loads(header_path(out).read_text())["settings"] == SETTINGS
    assert sorted(p.name for p in out.parent.iterdir()) == ["out.jsonl", "out.jsonl.job.json"]


def test_header_is_there_before_any_result(tmp_path: Path) -> None:
    with opened(tmp_path / "o"):
        assert header_path(tmp_path / "o").exists()
        assert (tmp_path / "o").read_bytes() == b""


def test_resume_writes_only_what_is_missing(out: Path) -> None:
    with opened(out) as writer:
        assert writer.finished == {"a", "b"}
        assert writer.append([result("b", "other"), result("c")]) == 1
    assert ids_in(out) == ["a", "b", "c"]
    assert "other" not in out.read_text()


def test_one_write_a_batch(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: calls.append(len(data)) or write(fd, data))
    with opened(out) as writer:
        writer.append([result("c"), result("d")])
    assert len(calls) == 1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 10_000))
def test_a_truncated_file_is_taken_up_anywhere(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "out.jsonl"
    with opened(path, overwrite=True) as writer:
        writer.append([result(i) for i in IDS])
    data = path.read_bytes()
    cut %= len(data) + 1
    path.write_bytes(data[:cut])
    with opened(path) as writer:
        whole = data[:cut].count(b"\n")
        assert writer.finished == set(IDS[:whole])
        assert bool(writer.notices) == (data[:cut] != b"" and not data[:cut].endswith(b"\n"))
        writer.append([result(i) for i in IDS])
    assert path.read_bytes() == data


def test_truncation_is_said(out: Path) -> None:
    with out.open("ab") as stream:
        stream.write(b'{"id": "c", "te')
    with opened(out) as writer:
        assert "cut off 15 bytes" in writer.notices[0]
    assert ids_in(out) == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{nonsense}\n", "line 3 is not a result"),
        (b"[]\n", "line 3 is not a result"),
        (b"\n", "line 3 is not a result"),
        (b'{"id": "foreign"}\n', "'foreign' is no id of the prompts file"),
        (b'{"id": ["a"]}\n', "is no id"),
        (b'{"id": "a"}\n', "also that of line 1"),
    ],
)
def test_lines_of_others_are_refused_and_kept(out: Path, line: bytes, words: str) -> None:
    with out.open("ab") as stream:
        stream.write(line + b"cut off?")
    before = out.read_bytes()
    with pytest.raises(ConfigError, match="--overwrite") as caught:
        opened(out)
    assert words in str(caught.value)
    assert out.read_bytes() == before
    with opened(out, overwrite=True) as writer:
        assert writer.finished == set()
    assert out.read_bytes() == b""


def test_other_settings_are_named(out: Path) -> None:
    other = {"batch_size": 8, "model": "n" * 64, "eos_token_ids": [2], "seed": 1}
    with pytest.raises(ConfigError) as caught:
        opened(out, settings=other)
    text = str(caught.value)
    assert "batch_size was 4, is 8" in text
    assert "seed was null, is 1" in text
    assert "model was" in text
    assert "eos_token_ids" not in text
    assert ids_in(out) == ["a", "b"]


def test_tuples_compare_as_the_header_gives_them_back(out: Path) -> None:
    with opened(out, settings={**SETTINGS, "eos_token_ids": (2,)}) as writer:
        assert writer.finished == {"a", "b"}


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 1, "digest": "x", "settings": {}}', "\xff"])
def test_a_damaged_header_is_refused(out: Path, text: str) -> None:
    header_path(out).write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match="is not a job's header"):
        opened(out)


def test_a_file_that_no_job_wrote_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes\n")
    with pytest.raises(ConfigError, match="no header"):
        opened(path)
    assert path.read_text() == "my notes\n"


def test_two_jobs_cannot_write_one_file(out: Path) -> None:
    with opened(out), pytest.raises(ConfigError, match="another job is writing"):
        opened(out, overwrite=True)
    assert ids_in(out) == ["a", "b"]
    opened(out).close()  # and the lock goes with the first


def test_a_result_of_no_prompt_is_refused(out: Path) -> None:
    with opened(out) as writer, pytest.raises(ConfigError, match="belongs to no prompt"):
        writer.append([result("c"), result("z")])
    assert ids_in(out) == ["a", "b"]


def test_a_full_disk_leaves_whole_lines(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = out.read_bytes()
    write = os.write

    def full(fd: int, data: bytes) -> int:
        if len(data) < 40:
            raise OSError(28, "No space left on device")
        return write(fd, data[: len(data) - 30])

    with opened(out) as writer:
        monkeypatch.setattr(results.os, "write", full)
        with pytest.raises(ConfigError, match="No space left"):
            writer.append([result("c"), result("d")])
    assert out.read_bytes() == before


@pytest.mark.parametrize("place", ["absent/out.jsonl", "."])
def test_places_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        opened(tmp_path / place)


def test_close_twice(out: Path) -> None:
    writer = opened(out)
    writer.close()
    writer.close()
