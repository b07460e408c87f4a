"""``bench.e2e_vllm`` with engines that fail in every way: what is kept, what is said, and what is left running."""

from __future__ import annotations

import ctypes
import json
import mmap
import re
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import fake_engine

from bench import e2e_vllm
from bench.e2e_table import Pick, Results
from bench.harness import Report
from sidp_runtime.planner import Planner, Workload
from sidp_runtime.planner.model_shape import bundled_config

WORKLOAD = "4:8:4"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"vocab_size": 100}')
    return tmp_path


def run(model: Path, systems: str, *more: str, **engine: Any) -> tuple[int, Report, dict[str, Any]]:
    """Exit code, report, and how it ran. No process is left."""
    engine["children"] = str(model / "children")
    words = ["--model", str(model), "--systems", systems, "--workloads", WORKLOAD, "--engine", json.dumps(engine)]
    code = e2e_vllm.main([*words, "--json", str(model / "out.json"), *more], serve=fake_engine.serve)
    report = Report.read(model / "out.json")
    started = [int(line) for line in (model / "children").read_text().split()]
    alive = [pid for pid in started if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    assert alive == []
    return code, report, report.ranks["e2e_vllm"]


def rows(report: Report) -> dict[str, Any]:
    return {figure.key: figure for figure in report.figures}


def test_systems_take_turns_and_a_loss_has_its_cause(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = {"dp": 10, "tp": 2.5, "sidp": 5}
    code, report, ran = run(model, "dp,tp,sidp", "--rounds", "2", "--repeats", "1", rate=rates)
    assert code == 0
    assert ran["order"] == ["dp", "tp", "sidp", "tp", "sidp", "dp"]
    found = rows(report)
    where = f"workload={WORKLOAD}"
    assert len(found[f"e2e_vllm/throughput/sidp {where}"].samples) == 2
    assert found["e2e_vllm/kv_of_an_engine/sidp"].samples == (1600,) * 4
    assert found[f"e2e_vllm/over_dp/sidp {where}"].median == pytest.approx(0.5, rel=0.1)
    assert found[f"e2e_vllm/over_tp/sidp {where}"].median == pytest.approx(4, rel=0.1)  # one engine has all prompts
    assert found[f"e2e_vllm/copied/sidp {where}"].median == 2  # GB of both engines
    (cause,) = ran["causes"][WORKLOAD]
    assert "SiDP < DP: steps 2.00 x as long, 1.00 x the tokens a step, 1.60 x the KV tokens an engine" in cause
    text = " ".join(capsys.readouterr().out.split())
    assert "SiDP/DP" in text
    assert "SiDP/TP" in text


def test_a_start_has_its_parts_and_its_ratio(model: Path) -> None:
    _, report, _ = run(model, "dp,sidp", "--rounds", "2", "--repeats", "1")
    found = rows(report)
    assert found["e2e_vllm/setup/sidp part=group"].samples == (1.5,) * 4
    assert found["e2e_vllm/setup/sidp part=pool"].samples == (0.5,) * 4
    assert not [key for key in found if key.startswith("e2e_vllm/setup/dp")]
    ours, theirs = (found[f"e2e_vllm/start/{system}"].samples for system in ("sidp", "dp"))
    assert found["e2e_vllm/start_over_dp/sidp"].samples == (ours[0] / theirs[0], ours[1] / theirs[1])


@pytest.mark.parametrize(
    ("words", "held"), [(("--cold",), True), ((), False), (("--cold", "--weights", "dummy"), False)]
)
def test_a_start_from_the_disk_is_held_to_that_of_plain_engines(
    model: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], held: bool
) -> None:
    monkeypatch.setattr(e2e_vllm, "num_gpus", lambda: 2)
    results = Results(e2e_vllm.parse(["--model", str(model), "--backend", "nvshmem", *words]))
    for system in ("dp", "sidp"):
        results.started(system, None, 10.0, [{"kv_tokens": 1, "setup": {}}] * 2)
    (figure,) = (figure for figure in results.figures() if figure.metric == "start_over_dp")
    assert (figure.bar is not None) == held
    if figure.bar is not None:
        assert (figure.bar.met(1.0), figure.bar.met(1.01)) == (True, False)


def test_a_cold_start_reads_the_disk(model: Path) -> None:
    mounts = [m for m in psutil.disk_partitions(all=True) if model.resolve().is_relative_to(m.mountpoint)]
    if max(mounts, key=lambda m: len(m.mountpoint)).fstype == "tmpfs":
        pytest.skip("files in memory have nowhere to go")
    weights = model / "model.safetensors"
    weights.write_bytes(bytes(8 << 20))  # not written to the disk yet
    assert cached_pages(weights) == (8 << 20) // mmap.PAGESIZE
    _, _, ran = run(model, "dp", "--cold", "--repeats", "1")
    assert ran["cold"]
    assert cached_pages(weights) == 0  # none of these engines reads it
    weights.read_bytes()
    _, _, ran = run(model, "dp", "--repeats", "1")
    assert not ran["cold"]
    assert cached_pages(weights) > 0


def cached_pages(path: Path) -> int:
    """Of a file, in the page cache: mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * (-(-len(mapped) // mmap.PAGESIZE)))()
        address = ctypes.addressof(view := ctypes.c_char.from_buffer(mapped))
        failed = libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), pages)
        del view
    assert not failed, ctypes.get_errno()
    return sum(page & 1 for page in pages)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("start", "engine 0: ValueError: no memory; its log: CudaError: the first cause"),
        ("exit", "engine 0 ended with exit code 7"),
        ("short", "engine 0 made 7 tokens of 8: is max_model_len below in [+] out"),
    ],
)
def test_a_system_that_fails_is_a_row_and_the_others_go_on(model: Path, how: str, words: str) -> None:
    rounds = "2" if how == "start" else "1"
    code, report, ran = run(model, "sidp,dp", "--rounds", rounds, "--repeats", "2", fail={"sidp": how})
    assert code == 1
    found = rows(report)
    assert found["e2e_vllm/run/sidp"].status == "error"
    assert re.search(words, found["e2e_vllm/run/sidp"].reason)
    assert len(found[f"e2e_vllm/throughput/dp workload={WORKLOAD}"].samples) == 2 * int(rounds)
    kept = found.get(f"e2e_vllm/throughput/sidp workload={WORKLOAD}")
    assert len(kept.samples if kept else ()) == (1 if how == "exit" else 0)
    assert ran["order"] == ["sidp", "dp", "dp"][: 1 + int(rounds)]  # it is not tried again


def test_a_system_that_hangs_ends_and_what_was_not_begun_is_named(model: Path) -> None:
    begin = time.monotonic()
    logs = model / "logs"
    code, report, _ = run(model, "sidp,dp", "--limit", "4", "--logs", str(logs), fail={"sidp": "hang"})
    assert time.monotonic() - begin < 60  # and not the 600 s that the engine would take
    assert code == 1
    sidp, dp = report.failures
    assert sidp.reason.startswith("no answer of engines [0")  # on a busy machine engine 1 has not started either
    assert dp.reason == "no time left: 4 s were spent"
    assert "fake_engine.py" in (logs / "sidp-0" / "engine-0.log").read_text(), "it does not say where it hangs"


def test_a_workload_has_its_own_number_of_samples(model: Path) -> None:
    code, report, ran = run(model, "dp,sidp", "--workloads", f"{WORKLOAD},4:8:2", "--repeats", "2,1")
    assert code == 0
    assert ran["repeats"] == [2, 1]
    found = rows(report)
    for system in ("dp", "sidp"):
        counts = [len(found[f"e2e_vllm/throughput/{system} workload={w}"].samples) for w in (WORKLOAD, "4:8:2")]
        assert counts == [2, 1]


def test_sidp_is_started_for_each_residency_that_the_planner_picks(model: Path) -> None:
    (model / "config.json").write_text(json.dumps(bundled_config("Qwen/Qwen3-32B")))
    words = ("--plan-for", "H200", "--workloads", "512:2048:208,8192:64:24,512:128:24,512:2048:260", "--repeats", "1")
    rate = {"dp": 1e6, "sidp": 1e5}
    words += ("--logs", str(model / "logs"))
    code, report, ran = run(model, "dp,sidp", *words, rate=rate, gpu_memory_utilization=0.57, max_num_seqs=256)
    assert code == 0
    folders = {path.name for path in (model / "logs").iterdir()}
    assert folders == {"dp-0", "sidp-0-0-auto", "sidp-0-40-auto", "sidp-0-62-was"}
    assert ran["resident"] == {"512:2048:208": 0, "8192:64:24": 40, "512:128:24": 62, "512:2048:260": 0}
    assert ran["mode"] == {"512:2048:208": "auto", "8192:64:24": "auto", "512:128:24": "was", "512:2048:260": "auto"}
    assert ran["order"] == ["dp", "sidp, 0 resident", "sidp, 40 resident", "sidp, 62 resident, mode was"]
    found = rows(report)
    assert {key for key in found if "/over_dp/" in key} == {
        "e2e_vllm/over_dp/sidp workload=512:2048:208 resident=0",
        "e2e_vllm/over_dp/sidp workload=8192:64:24 resident=40",
        "e2e_vllm/over_dp/sidp workload=512:128:24 resident=62 mode=was",
        "e2e_vllm/over_dp/sidp workload=512:2048:260 resident=0",
    }
    assert found["e2e_vllm/kv_of_an_engine/dp"].samples == (1000, 1000)
    assert found["e2e_vllm/kv_of_an_engine/sidp resident=0"].samples == (1600, 1600)
    assert found["e2e_vllm/kv_of_an_engine/sidp resident=40"].samples == (1200, 1200)
    assert len(found["e2e_vllm/start/sidp resident=0"].samples) == 1
    (cause,) = ran["causes"]["8192:64:24"]
    assert "1.20 x the KV tokens an engine" in cause
    assert "1.60 x the KV tokens an engine" in ran["causes"]["512:2048:208"][0]


def test_a_residency_that_fails_leaves_the_others(model: Path) -> None:
    (model / "config.json").write_text(json.dumps(bundled_config("Qwen/Qwen3-32B")))
    words = ("--plan-for", "H200", "--workloads", "8192:64:24,512:2048:208", "--repeats", "1", "--rounds", "2")
    fail = {"fail": {"sidp": "start"}, "fail_resident": 40}
    code, report, ran = run(model, "sidp", *words, gpu_memory_utilization=0.57, max_num_seqs=256, **fail)
    assert code == 1
    assert ran["order"] == ["sidp, 40 resident", "sidp, 0 resident", "sidp, 0 resident"]
    found = rows(report)
    assert found["e2e_vllm/run/sidp resident=40"].reason.startswith("with 40 resident: engine 0: ValueError")
    assert len(found["e2e_vllm/throughput/sidp workload=512:2048:208 resident=0"].samples) == 2


def test_the_planner_is_asked_about_these_engines() -> None:
    def pick(workload: str, *more: str) -> tuple[int, str]:
        words = ["--model", "Qwen/Qwen3-32B", "--workloads", workload, "--plan-for", "H200", *more]
        options = e2e_vllm.parse(words)
        (pool,) = {str(s["pool"]["mode"]) for s in e2e_vllm.engine_settings("sidp", options, options.picks[workload])}
        return options.picks[workload].resident, pool

    small = ("--engine", '{"gpu_memory_utilization": 0.57, "max_num_seqs": 256}')
    assert pick("1024:128:192") == (62, "was")
    assert pick("1024:128:192", *small) == (32, "auto")
    assert pick("512:2048:208", *small) == (0, "auto")
    assert pick("512:2048:208", "--engine", '{"gpu_memory_utilization": 0.57, "max_num_seqs": 16}') == (62, "was")
    assert pick("512:326:160", *small) < pick("512:128:160:4096", *small)  # which has a tail
    assert e2e_vllm.job("512:128:160:4096") == [Workload(512, 128, 152), Workload(512, 4096, 8)]
    assert e2e_vllm.job("512:128:2:4096") == [Workload(512, 128, 2)]


def test_the_planner_pads_as_the_engines_do(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[Planner] = []
    plain = Planner.plan

    def plan(planner: Planner, *job: Workload) -> Any:
        planned.append(planner)
        return plain(planner, *job)

    monkeypatch.setattr(Planner, "plan", plan)
    words = ["--model", "Qwen/Qwen3-32B", "--workloads", "64:16:2", "--plan-for", "H200", "--engine"]
    e2e_vllm.parse([*words, '{"compilation_config": {"cudagraph_capture_sizes": [8, 1, 8]}}'])
    e2e_vllm.parse([*words, '{"compilation_config": 3}'])
    assert [planner.row_sizes for planner in planned] == [(1, 8), ()]


def test_engines_keep_the_layers_that_the_plan_names() -> None:
    words = ["--model", "Qwen/Qwen3-32B", "--workloads", "4096:512:48,8192:64:24", "--plan-for", "H200"]
    options = e2e_vllm.parse([*words, "--engine", '{"gpu_memory_utilization": 0.57, "max_num_seqs": 256}'])
    engines = [e2e_vllm.engine_settings("sidp", options, Pick(count, "auto"))[1] for count in (10, 40)]
    runs, apart = (settings["pool"]["resident_layers"] for settings in engines)
    assert runs == list(range(54, 64))
    assert apart == [layer * 64 // 40 for layer in range(40)]


def test_wrong_options(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, text in (
        (("--systems", "dp,ep"), "there is no system ep"),
        (("--systems", "sidp-was", "--sidp", '{"mode": "cas"}'), "--sidp gives a mode"),
        (("--workloads", "1024:128"), "a workload is in:out:prompts"),
        (("--engine", "[]"), "no JSON object"),
        (("--plan-for", "H200", "--sidp", '{"resident_layers": [1]}'), "has the planner pick them"),
        (("--plan-for", "H2000"), "--plan-for H2000"),
        (("--plan-for", "H200", "--systems", "dp,sidp-was"), "has the planner pick the mode"),
        (("--plan-for", "H200", "--quick"), "--quick has small ones"),
        (("--repeats", "0"), "a whole number above 0, or one for each workload"),
        (("--repeats", "3,1"), "--repeats 3,1: a whole number above 0, or one for each workload"),
    ):
        with pytest.raises(SystemExit) as caught:
            e2e_vllm.parse(["--model", str(model), *words])
        assert caught.value.code == 2
        assert text in capsys.readouterr().err


def test_a_mode_may_stand_among_the_settings_of_the_pool(model: Path) -> None:
    options = e2e_vllm.parse(["--model", str(model), "--sidp", '{"mode": "cas", "ring_slots": 3}'])
    first, second = e2e_vllm.engine_settings("sidp", options)
    assert (first["rank"], second["rank"], first["port"]) == (0, 1, second["port"])
    assert first["pool"]["mode"] == "cas"
    assert first["pool"]["ring_slots"] == 3
    options = e2e_vllm.parse(["--model", str(model), "--systems", "sidp-was"])
    assert e2e_vllm.engine_settings("sidp-was", options)[0]["pool"]["mode"] == "was"
