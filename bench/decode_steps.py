"""Decode steps of engines in runs of ``bench.e2e_vllm``, by their logs, beside what the planner says of steps in CaS.

python -m bench.decode_steps --model Qwen/Qwen3-32B --run RUN.json LOGS [--run RUN.json LOGS ...] --json FILE

``LOGS``: the folder of the run's ``--logs``. vLLM writes a line every ten seconds; those count in which no prompt was
worked off and as many sequences ran as in the line before. Runs of one commit, model and machine go into one file.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from sidp_runtime.errors import SidpError
from sidp_runtime.integrations.vllm.settings import PoolSettings
from sidp_runtime.planner import GpuProfile, MemorySettings, ModelShape, StepLoad, Streamed, memory
from sidp_runtime.planner.step_time import CAS_WAIT_S, StepTimes, step_times

_LINE = re.compile(
    r"Avg prompt throughput: ([\d.]+) tokens/s, Avg generation throughput: ([\d.]+) tokens/s, "
    r"Running: (\d+) reqs, Waiting: \d+ reqs, GPU KV cache usage: ([\d.]+)%"
)
_FOLDER = re.compile(r"(?P<system>\w+)-\d+(?:-(?P<resident>\d+)(?:-auto)?)?")  # of mode was nothing is planned
_ALIKE = ("commit", "dirty", "shape", "machine", "versions")


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
    """Of each start of SiDP and plain DP and each number of sequences: ``kv_tokens`` and ``ms`` of all engines' lines.

    ``rows``: the sequences, padded to a captured size. Steps of more rows than a request holds were in WaS.
    """
    case = run["cases"]["e2e_vllm"]
    sizes, pool = case["engine"]["compilation_config"]["cudagraph_capture_sizes"], PoolSettings(**case["sidp"])
    engines = {
        (figure["subject"], figure["parameters"].get("resident")): int(figure["median"])
        for figure in run["figures"]
        if figure["metric"] == "kv_of_an_engine" and figure["subject"] in ("sidp", "dp")
        if "mode" not in figure["parameters"]
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
            resident = len(pool.resident_layers)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        for sequences, kv_tokens, ms in read_log(lines, num_kv_tokens):
            rows = min((size for size in sizes if size >= sequences), default=sequences)
            if system == "sidp" and rows > pool.max_rows:
                continue
            new = {"system": system, "resident": resident, "sequences": sequences, "rows": rows}
            step = steps.setdefault((system, resident, sequences), {**new, "kv_tokens": [], "ms": []})
            step["kv_tokens"].append(kv_tokens)
            step["ms"].append(round(ms, 2))
    return list(steps.values())


def planned(
    shape: ModelShape, gpu: GpuProfile, replicas: int, step: Mapping[str, Any], kv_tokens: int
) -> tuple[StepTimes, int]:
    """The planner's times of such a step, and the layers that a replica asks its peers for."""
    streamed = Streamed(0, 0)  # plain DP
    if step["resident"] is not None:
        streamed = memory.streamed(memory.place(shape, replicas, step["resident"], MemorySettings()))
    sequences = step["sequences"]
    load = StepLoad(sequences, kv_tokens / sequences, padding_rows=step["rows"] - sequences)
    return step_times(gpu, shape, load, streamed, replicas), streamed.num_layers


def table(shape: ModelShape, document: Mapping[str, Any]) -> Iterator[str]:
    """As Markdown, medians of lines."""
    yield "| resident | sequences | rows | KV tokens | DP planned, ms | measured | planned | off | without t_wait |"
    yield "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    gpu = GpuProfile.read(document["gpu"])
    for step in document["steps"]:
        kv_tokens, ms = round(median(step["kv_tokens"])), median(step["ms"])
        times, remote = planned(shape, gpu, document["replicas"], step, kv_tokens)
        expected = times.cas_s if remote else times.local_s
        short = _off(expected - remote * CAS_WAIT_S, ms) if remote else "-"
        cells: list[object] = ["plain DP" if step["resident"] is None else step["resident"], step["sequences"]]
        cells += [step["rows"], kv_tokens, f"{times.local_s * 1e3:.1f}", f"{ms:.1f}", f"{expected * 1e3:.1f}"]
        yield f"| {' | '.join(map(str, cells))} | {_off(expected, ms)} | {short} |"


def _off(expected_s: float, ms: float) -> str:
    return f"{expected_s / ms * 1e5 - 100:+.1f} %"


def collect(shape: ModelShape, runs: Sequence[tuple[Mapping[str, Any], Path]]) -> dict[str, Any]:
    """The document, but for its command. ``ValueError`` says what of a run does not fit."""
    first = runs[0][0]
    found: dict[str, Any] = {"runs": [], "steps": []}
    for run, logs in runs:
        if different := [key for key in _ALIKE if run.get(key) != first.get(key)]:
            raise ValueError(f"the runs differ in {', '.join(different)}")
        if run["shape"] != (name := shape.name.rpartition("/")[2].lower()):
            raise ValueError(f"a run is of {run['shape']}, and the model is {name}")
        case = run["cases"]["e2e_vllm"]
        if PoolSettings(**case["sidp"]).mode == "was":
            raise ValueError("a run is in mode was; its steps are not planned here")
        if not (steps := read_run(run, logs)):
            raise ValueError(f"no line of the logs in {logs} is of decoding alone: wrong folder, or too short a run")
        found["runs"].append({key: run[key] for key in ("command", "time", "settings")})
        found["steps"] += steps
        found["replicas"] = case["world_size"]
    name = next(iter(first["machine"]["gpus"]), "a machine without GPUs")
    if (gpu := GpuProfile.of_device(name)) is None:
        raise ValueError(f"no profile of {name} is bundled")
    return {**{key: first.get(key) for key in _ALIKE}, "gpu": gpu.name, **found}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="as of sidp plan")
    parser.add_argument("--run", nargs=2, action="append", required=True, type=Path, metavar=("RUN.json", "LOGS"))
    parser.add_argument("--json", required=True, type=Path)
    options = parser.parse_args(arguments)
    if len({run.resolve() for run, _ in options.run}) < len(options.run):
        parser.error("a run is given twice")
    try:
        shape = ModelShape.read(options.model)
        found = collect(shape, [(json.loads(run.read_text(encoding="utf-8")), logs) for run, logs in options.run])
    except KeyError as error:
        parser.error(f"not a result of bench.e2e_vllm with captured sizes: it has no {error}")
    except (SidpError, OSError, ValueError) as error:
        parser.error(str(error))
    command = " ".join(["python -m bench.decode_steps", *(sys.argv[1:] if arguments is None else arguments)])
    options.json.write_text(json.dumps({"command": command, **found}, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(shape, found)))


if __name__ == "__main__":
    main()
