"""Decode steps of engines in a run of ``bench.e2e_vllm``, by their logs, beside what the planner says of them.

python -m bench.decode_steps --model Qwen/Qwen3-32B --run RUN.json LOGS [--run RUN.json LOGS ...] --json FILE

``LOGS``: the folder of the run's ``--logs``. vLLM writes a line every ten seconds; those count in which no prompt was
worked off and as many sequences ran as in the line before. The table is for two replicas in CaS.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from sidp_runtime.planner import ModelShape
from sidp_runtime.planner.gpus import GpuProfile
from sidp_runtime.planner.step_time import CAS_WAIT_S, StepLoad, StepTimes, Streamed, step_times

_LINE = re.compile(
    r"Avg prompt throughput: ([\d.]+) tokens/s, Avg generation throughput: ([\d.]+) tokens/s, "
    r"Running: (\d+) reqs, Waiting: \d+ reqs, GPU KV cache usage: ([\d.]+)%"
)
_FOLDER = re.compile(r"(?P<system>\w+)-\d+(?:-(?P<resident>\d+))?")
_GPU = "H200"  # whose measured profile is bundled


def read_log(lines: Iterable[str], kv_tokens: int) -> Iterator[tuple[int, int, float]]:
    """Sequences, tokens of their KV on the mean, and ms a step, of each line that counts; of an engine's log."""
    last: tuple[int, float] | None = None
    for line in lines:
        if (found := _LINE.search(line)) is None:
            continue
        prompts, generated, used = (float(found[i]) for i in (1, 2, 4))
        running = int(found[3])
        if last is not None and last[0] == running and generated > 0 and prompts == 0:
            yield running, round(kv_tokens * (last[1] + used) / 200), running / generated * 1e3
        last = running, used


def read_run(run: Mapping[str, Any], logs: Path) -> list[dict[str, Any]]:
    """Of each start of SiDP and plain DP and each number of sequences: ``kv_tokens`` and ``ms`` of both engines' lines.

    ``rows``: the sequences, padded to a captured size.
    """
    settings = run["cases"]["e2e_vllm"]
    sizes = settings["engine"]["compilation_config"]["cudagraph_capture_sizes"]
    engines = {
        (figure["subject"], figure["parameters"].get("resident")): int(figure["median"])
        for figure in run["figures"]
        if figure["metric"] == "kv_of_an_engine" and figure["subject"] in ("sidp", "dp")
    }
    steps: dict[tuple[str, int | None, int], dict[str, Any]] = {}
    for log in sorted(logs.glob("*/engine-*.log")):
        if (named := _FOLDER.fullmatch(log.parent.name)) is None:
            continue
        system, resident = named["system"], None if named["resident"] is None else int(named["resident"])
        if (system, resident) not in engines:
            continue
        num_kv_tokens = engines[system, resident]
        if system == "sidp" and resident is None:  # as given, not picked by the planner
            resident = len(settings["sidp"].get("resident_layers", []))
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        for sequences, kv_tokens, ms in read_log(lines, num_kv_tokens):
            rows = min((size for size in sizes if size >= sequences), default=sequences)
            new = {"system": system, "resident": resident, "sequences": sequences, "rows": rows}
            step = steps.setdefault((system, resident, sequences), {**new, "kv_tokens": [], "ms": []})
            step["kv_tokens"].append(kv_tokens)
            step["ms"].append(round(ms, 2))
    return list(steps.values())


def planned(shape: ModelShape, step: Mapping[str, Any], kv_tokens: int) -> tuple[StepTimes, int]:
    """The planner's times of such a step of two replicas, and the layers that a replica asks its peer for."""
    remote = 0 if step["resident"] is None else (shape.num_layers - step["resident"]) // 2
    load = StepLoad(step["rows"], kv_tokens / step["rows"])
    streamed = Streamed(remote, remote * shape.linear_bytes // shape.num_layers)
    return step_times(GpuProfile.read(_GPU), shape, load, streamed, 2), remote


def table(shape: ModelShape, steps: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """As Markdown, medians of lines."""
    yield "| resident | sequences | rows | KV tokens | plain DP planned, ms | measured | planned | off | without wait |"
    yield "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for step in steps:
        kv_tokens, ms = round(median(step["kv_tokens"])), median(step["ms"])
        times, remote = planned(shape, step, kv_tokens)
        expected = times.cas_s if remote else times.local_s
        short = f"{(expected - remote * CAS_WAIT_S) / ms * 1e3 - 1:+.1%}" if remote else ""
        cells: list[object] = ["plain DP" if step["resident"] is None else step["resident"], step["sequences"]]
        cells += [step["rows"], kv_tokens, f"{times.local_s * 1e3:.1f}", f"{ms:.1f}", f"{expected * 1e3:.1f}"]
        yield f"| {' | '.join(map(str, cells))} | {expected / ms * 1e3 - 1:+.1%} | {short} |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs=2, action="append", required=True, type=Path, metavar=("RUN.json", "LOGS"))
    parser.add_argument("--model", required=True, help="as of sidp plan")
    parser.add_argument("--json", required=True, type=Path)
    options = parser.parse_args(arguments)
    runs = [(json.loads(run.read_text(encoding="utf-8")), logs) for run, logs in options.run]
    steps = [step for run, logs in runs for step in read_run(run, logs)]
    first = runs[0][0]
    if any(run[key] != first[key] for run, _ in runs for key in ("commit", "shape", "versions")):
        parser.error("runs of one commit, model and set of versions go into one file")
    command = " ".join(["python -m bench.decode_steps", *(sys.argv[1:] if arguments is None else arguments)])
    document = {"command": command, "commands": [run["command"] for run, _ in runs]} | {
        key: first[key] for key in ("time", "shape", "commit", "dirty", "machine", "versions", "settings")
    }
    options.json.write_text(json.dumps({**document, "steps": steps}, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(ModelShape.read(options.model), steps)))


if __name__ == "__main__":
    main()
