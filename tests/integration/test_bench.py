"""``sidp bench``: a run on the host backend, comparing, plotting, and what wrong data and hanging cases do."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import bench.rank
import bench.runner
import bench.scale
from bench.cases import CASES, step_time
from bench.compare import compare
from bench.environment import environment
from bench.harness import Bar, Case, Figure, Report
from bench.scale import SCALE_CASES, worlds
from bench.shapes import SHAPES
from sidp_runtime.cli import app
from sidp_runtime.errors import ConfigError


def sidp(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a quick run of three cases."""
    path = tmp_path_factory.mktemp("bench") / "results.json"
    patterns = ["fetch", "step_boundary", "host_*"]
    ran = sidp("run", "--quick", "--json", str(path), *(word for p in patterns for word in ("--case", p)))
    assert ran.exit_code == 0, ran.output
    return path


def test_list_names_every_case() -> None:
    text = sidp("list").output
    assert all(case.key[:8] in text for case in CASES)
    modules = {path.stem for path in (Path(bench.runner.__file__).parent / "cases").glob("*.py")} - {"__init__"}
    assert modules == {case.key for case in (*CASES, *SCALE_CASES)}


def test_a_run_has_samples_of_every_repeat_beside_its_peers(results: Path) -> None:
    report = Report.read(results)
    rows = {figure.key: figure for figure in report.figures}
    assert {figure.case for figure in report.figures} == {"fetch", "step_boundary", "host_cost"}
    for subject in ("sidp", "memcpy", "gloo_broadcast", "gloo_all_gather"):
        figure = rows[f"fetch/bandwidth/{subject} bytes=65536"]
        assert len(figure.samples) == 3
        assert min(figure.samples) > 0
    assert rows["step_boundary/step/prefetch_in_step tokens=8"].status == "unavailable"
    document = json.loads(results.read_text())
    assert document["machine"]["processor"]
    assert document["versions"]["torch"]
    assert document["commit"]
    assert isinstance(document["dirty"], bool)
    assert set(document["versions"]) >= {"driver", "cuda_of_driver", "cuda_of_build", "cuda_of_torch", "nvshmem"}
    assert document["cases"]["fetch"] | {"seconds": 0} == {
        "world_size": 2,
        "gpus": 0,
        "shared_gpu": False,
        "seconds": 0,
    }
    assert list(Path("/dev/shm").glob("sidp-bench-*")) == []


def test_the_commit_of_a_copy_without_history(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, commit, dirty in (("0123abc-dirty", "0123abc", True), ("a" * 40, "a" * 40, False)):
        monkeypatch.setenv("SIDP_BENCH_COMMIT", text)
        taken = environment()
        assert (taken["commit"], taken["dirty"]) == (commit, dirty)
        assert taken["settings"]["SIDP_BENCH_COMMIT"] == text
    monkeypatch.setenv("SIDP_BENCH_COMMIT", "main")
    with pytest.raises(ConfigError, match="SIDP_BENCH_COMMIT='main' is not a commit"):
        environment()


def test_plot_writes_pictures(results: Path, tmp_path: Path) -> None:
    report = Report.read(results)
    entry = {"rank": 0, "tokens": 8, "layer": 0, "streamed": True, "start_ms": 0.0, "wait_ms": 1.0, "compute_ms": 2.0}
    report.timeline = [entry, entry | {"rank": 1, "streamed": False}]
    report.write(tmp_path / "with-timeline.json")
    drawn = sidp("plot", str(tmp_path / "with-timeline.json"), "--out", str(tmp_path / "pictures"))
    assert drawn.exit_code == 0, drawn.output
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in pictures] == ["fetch.png", "step_boundary.png", "timeline.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def figure(subject: str, median: float, *, higher: bool = True, **arguments: Any) -> Figure:
    return Figure("case", "metric", subject, "unit", {"bytes": 1}, (median,), higher, **arguments)


def report(*figures: Figure) -> Report:
    return Report("command", "host", "small", {"machine": {"name": "here"}}, list(figures))


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (figure("a", 100.0), figure("a", 96.0), "ok"),
        (figure("a", 100.0), figure("a", 94.0), "worse"),
        (figure("a", 100.0, higher=False), figure("a", 94.0, higher=False), "ok"),
        (figure("a", 100.0, higher=False), figure("a", 106.0, higher=False), "worse"),
        (figure("a", 100.0), figure("b", 100.0), "missing"),
        (figure("a", 100.0), dataclasses.replace(figure("a", 0), samples=(), status="unavailable"), "missing"),
        (dataclasses.replace(figure("a", 0), samples=(), status="unavailable"), figure("a", 1.0), "new"),
    ],
)
def test_compare_finds_slower_and_missing_rows(old: Figure, new: Figure, verdict: str) -> None:
    result = compare(report(old), report(new), 0.05)
    assert result.rows[0].verdict == verdict
    assert result.passed == (verdict in ("ok", "new"))


def test_compare_of_files(results: Path, tmp_path: Path) -> None:
    assert sidp("compare", str(results), str(results)).exit_code == 0
    slower = json.loads(results.read_text())
    slower["figures"] = slower["figures"][1:]
    (tmp_path / "other.json").write_text(json.dumps(slower))
    found = sidp("compare", str(results), str(tmp_path / "other.json"), "--threshold", "0.05")
    assert found.exit_code == 1
    assert "missing" in found.output
    (tmp_path / "none.json").write_text("{}")
    assert "is no result of" in sidp("compare", str(results), str(tmp_path / "none.json")).stderr


def run_own(monkeypatch: pytest.MonkeyPatch, key: str, **arguments: Any) -> Report:
    monkeypatch.setattr(bench.runner, "CASES_PACKAGE", "helpers.bench_cases")
    return bench.runner.run(command="test", quick=True, table=[Case(key, "", "", **arguments)])


def test_wrong_data_are_an_error_and_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = run_own(monkeypatch, "wrong_data").figures
    assert (row.status, row.samples, row.passed) == ("error", (), False)
    assert "did not arrive" in row.reason


def test_figures_are_on_disk_after_each_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run_case(case: Case, report: Report, *rest: Any) -> dict[str, Any]:
        if case.key == "breaks":
            raise KeyboardInterrupt
        report.figures.append(Figure(case.key, "m", "s", "u", samples=(1.0,)))
        return {"shared_gpu": False, "seconds": 1.0}

    monkeypatch.setattr(bench.runner, "_run_case", run_case)
    table, path = [Case("done", "", ""), Case("breaks", "", "")], tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        bench.runner.run(command="test", table=table, json_path=path)
    assert [figure.case for figure in Report.read(path).figures] == ["done"]


def test_a_bar_holds_of_as_many_gpus_as_take_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figure = Figure("c", "m", "s", "u", samples=(2.0,), bar=Bar(1.0, at_least=False, gpus=4))
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(figure.to_json() | {"bar_gpus": 4}) + "\n")
    monkeypatch.setattr(bench.runner.environment, "num_gpus", lambda: 4)
    for world_size, missed in ((2, False), (4, True)):
        report = Report("test", "nvshmem", "small", {})
        bench.runner._collect(path, report, world_size)
        assert bool(report.failures) == missed


def test_what_makes_a_figure_mean_nothing_is_an_error_of_peers_too() -> None:
    def fail(error: Exception) -> dict[str, Any]:
        return bench.rank._attempt("some_peer", lambda: (_ for _ in ()).throw(error))

    assert fail(bench.rank.DilutedSampleError("the copies had ended"))["status"] == "error"
    assert fail(bench.rank.WrongDataError("other bytes"))["status"] == "error"
    assert fail(RuntimeError("it does not run here"))["status"] == "unavailable"


def test_the_bars_of_steps_are_held_eager_and_captured() -> None:
    rows: dict[str, Figure] = {}

    class Context:
        on_gpu, backend = True, "nvshmem"

        def figure(self, metric: str, subject: str, unit: str, **arguments: Any) -> None:
            rows[f"{metric}/{subject}"] = Figure("step_time", metric, subject, unit, **arguments)

    steps = {"all_local": 10.0, "all_local_graph": 9.0, "sidp_was": 16.0, "sidp_was_graph": 16.8, "sidp_cas": 11.0}
    samples = bench.rank.Samples({name: [s] * 3 for name, s in steps.items()}, {"sidp_cas_graph": ("error", "broke")})
    link = bench.rank.Samples({"cudaMemcpyAsync_write": [2.0] * 3, "cudaMemcpyAsync": [2.2] * 3})
    step_time._ratios(Context(), samples, 128, link, 8)  # type: ignore[arg-type]
    assert (rows["over_floor/sidp_was"].median, rows["over_floor/sidp_was"].passed) == (1.0, True)
    assert (rows["over_floor/sidp_was_graph"].median, rows["over_floor/sidp_was_graph"].passed) == (1.05, False)
    assert (rows["over_local/sidp_cas"].median, rows["over_local/sidp_cas"].bar) == (1.1, step_time.CAS_BAR)
    assert rows["over_local/sidp_cas_graph"].reason == "broke"
    step_time._ratios(Context(), samples, 256, bench.rank.Samples({}, {"cudaMemcpyAsync_write": ("error", "cut")}), 8)  # type: ignore[arg-type]
    assert rows["over_local/sidp_cas"].bar is None
    assert (rows["over_floor/sidp_was"].status, rows["over_floor/sidp_was"].reason) == ("error", "cut")


def test_steps_have_clocks_and_offloading_is_timed_at_three_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = dataclasses.replace(SHAPES["small"], tokens=(1, 2, 4, 8, 16))
    monkeypatch.setitem(SHAPES, "small", shape)
    report = bench.runner.run(command="test", patterns=["step_time"], shape="small")
    assert [f.key for f in report.figures if f.status == "error"] == []
    counts: dict[tuple[str, str], list[int | str]] = {}
    for row in report.figures:
        counts.setdefault((row.metric, row.subject), []).append(row.parameters.get("tokens", ""))
    for metric in ("step", "sm_clock"):
        assert counts[metric, "pinned_offload"] == [1, 4, 16]
        assert counts[metric, "sidp_was"] == counts[metric, "tensor_parallel"] == [1, 2, 4, 8, 16]
    clocks = [f for f in report.figures if f.metric == "sm_clock"]
    assert {(f.status, f.higher_is_better) for f in clocks} == {("unavailable", None)}


def test_a_case_that_hangs_is_killed_and_keeps_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, row = run_own(monkeypatch, "hangs", deadline_s=3).figures
    assert kept.samples == (1.0,)
    assert row.status == "error"
    assert "killed after 3 s" in row.reason


def test_a_run_out_of_time_says_so_and_fails(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    ran = sidp("run", "--quick", "--case", "step_time", "--case", "ring_*", "--limit", "1", "--json", str(path))
    assert ran.exit_code == 1
    assert "killed after" in " ".join(ran.output.split())  # the start of the server of all ranks counts, if it is first
    assert [f.reason[:9] for f in Report.read(path).failures if f.subject == "case"] == ["killed af", "not begun"]


def test_a_missed_bar_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    report = run_own(monkeypatch, "misses")
    assert [figure.metric for figure in report.failures] == ["held"]
    assert not figure("a", 1.0, bar=Bar(2.0, at_least=True)).passed
    assert figure("a", 1.0, bar=Bar(2.0, at_least=False)).passed


def test_the_scaling_run_doubles_its_ranks(tmp_path: Path) -> None:
    assert [worlds(most) for most in (2, 4, 6, 8)] == [[2], [2, 4], [2, 4, 6], [2, 4, 8]]
    bench.scale.scale(backend="host", ranks=2, num_gpus=0, command="", quick=True, patterns=["scale_steps"]).write(
        tmp_path / "scale.json"
    )
    report = Report.read(tmp_path / "scale.json")
    assert report.failures == []
    rows = {figure.key: figure for figure in report.figures}
    measured = rows["scale_steps/step/sidp_was_staggered ranks=2 slots=2 tokens=8"]
    predicted = rows["scale_steps/simulated/sidp_was_staggered ranks=2 slots=2 tokens=8"]
    assert min(*measured.samples, *predicted.samples) > 0


def test_unknown_cases_and_usage() -> None:
    with pytest.raises(ConfigError, match="no case is called nothing"):
        bench.runner.select(["nothing"], "host", CASES)
    assert sidp("run", "--backend", "smoke").exit_code == 1
    assert sidp("run", "--case").exit_code == 2
