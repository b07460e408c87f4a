"""Plain data parallelism, tensor parallelism and SiDP in vLLM, side by side: KV tokens an engine and tokens a second.

    python -m bench.e2e_vllm --model DIR --systems dp,tp,sidp --workloads 1024:128:512 --json out.json

METHODOLOGY.md says how it measures. Exit code 1 if a system failed or a bar was missed; all else is in the file anyway.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from sidp_runtime import _C
from sidp_runtime.errors import SidpError
from sidp_runtime.integrations.vllm.settings import PoolSettings
from sidp_runtime.planner import GpuProfile, MemorySettings, ModelShape, Plan, Planner, Workload

from . import e2e_table, vllm_engine
from .e2e_table import Pick, Results, Sample
from .engines import EngineError, Engines, Serve
from .environment import environment, num_gpus
from .harness import Report

SYSTEMS = ("dp", "tp", "sidp", "sidp-was", "sidp-cas")
WARM_UP_TOKENS = 16
LONG_SHARE = 0.05  # of a workload's requests, where it has long ones
_GRACE_S = 15.0


def main(arguments: Sequence[str] | None = None, serve: Serve = vllm_engine.serve) -> int:
    """The command. ``serve``: runs in an engine's process."""
    options = parse(arguments)
    command = " ".join(["python -m bench.e2e_vllm", *(sys.argv[1:] if arguments is None else arguments)])
    report = Report(command, options.backend, Path(options.model).name, environment())
    results, console = Results(options), Console(width=None if sys.stdout.isatty() else 200)

    def save() -> None:
        report.figures, report.ranks = results.figures(), {"e2e_vllm": results.run()}
        if options.json is not None:
            report.write(options.json)

    with contextlib.ExitStack() as stack:
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that engines are ended
        stack.callback(signal.signal, signal.SIGTERM, before)
        logs = options.logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sidp-e2e-")))
        for number in range(options.rounds):
            for system in order(options.systems, number):
                for pick, chosen in starts(system, options).items():
                    if (system, pick) in results.failed:
                        continue
                    folder = logs / "-".join(map(str, (system, number, *(pick or ()))))
                    try:
                        _measure(system, pick, chosen, options, results, serve, folder, save)
                    except EngineError as error:
                        with_ = "" if pick is None else f"with {pick}: "
                        results.failed[system, pick] = with_ + str(error)
                        console.print(f"{system}: {with_}{error}", markup=False, highlight=False)
                    save()
    e2e_table.render(results, console)
    return 1 if report.failures else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, with what follows from others filled in. Wrong ones end the program (exit code 2)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument(
        "--systems", default="dp,tp,sidp", help=f"of {', '.join(SYSTEMS)}; sidp: mode auto, or as planned"
    )
    parser.add_argument("--replicas", type=int, default=2, help="engines of dp and sidp, GPUs of tp")
    parser.add_argument("--workloads", help="in:out:prompts[:long out for 5 %% of them],... [1024:128:512]")
    parser.add_argument("--repeats", help="samples at each start of a system, of all workloads or of each: 3,3,1 [3]")
    parser.add_argument("--rounds", type=int, default=1, help="how often each system is started, in rotated order")
    parser.add_argument("--backend", default="host", help="sidp's: host or nvshmem")
    parser.add_argument("--weights", default="checkpoint", choices=("checkpoint", "dummy"))
    parser.add_argument("--cold", action="store_true", help="the model's files leave the page cache before each start")
    parser.add_argument("--sidp", type=_object, default={}, help="more settings of the pool, a JSON object")
    parser.add_argument(
        "--plan-for",
        metavar="GPU",
        help="as sidp plan --gpu takes it: SiDP is started for each number of resident layers and mode that the "
        "planner picks; steps padded to the cudagraph_capture_sizes of --engine",
    )
    parser.add_argument("--engine", type=_object, default={}, help="arguments of vllm.LLM for all, a JSON object")
    parser.add_argument("--quick", action="store_true", help="does it run? Few prompts and little memory, no figure")
    parser.add_argument("--limit", type=float, default=7200, help="seconds of the whole run; what is left then fails")
    parser.add_argument("--answer-limit", type=float, default=1800, help="seconds of a start, or of one sample")
    parser.add_argument("--logs", type=Path, help="folder for the engines' output; by default it is not kept")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    options.systems = options.systems.split(",")
    if unknown := [system for system in options.systems if system not in SYSTEMS]:
        parser.error(f"there is no system {', '.join(unknown)}; there are: {', '.join(SYSTEMS)}")
    if len(set(options.systems)) < len(options.systems):
        parser.error("a system is named twice")
    if "mode" in options.sidp and any(system.startswith("sidp-") for system in options.systems):
        parser.error("--sidp gives a mode, and a system of --systems another")
    options.workloads = (options.workloads or ("64:16:8" if options.quick else "1024:128:512")).split(",")
    if wrong := [w for w in options.workloads if not 3 <= len(p := w.split(":")) <= 4 or not all(map(_positive, p))]:
        parser.error(f"{', '.join(wrong)}: a workload is in:out:prompts or in:out:prompts:long, whole numbers above 0")
    repeats = (options.repeats or ("2" if options.quick else "3")).split(",")
    if not all(map(_positive, repeats)) or len(repeats) not in (1, len(options.workloads)):
        parser.error(f"--repeats {','.join(repeats)}: a whole number above 0, or one for each workload")
    options.repeats = [int(n) for n in repeats] * (len(options.workloads) if len(repeats) == 1 else 1)
    options.gpus = min(num_gpus(), options.replicas)
    if options.plan_for and "resident_layers" in options.sidp:
        parser.error("--sidp names resident layers, and --plan-for has the planner pick them")
    if options.plan_for and ("mode" in options.sidp or {"sidp-was", "sidp-cas"} & set(options.systems)):
        parser.error("--plan-for has the planner pick the mode, and one is given")
    if options.plan_for and options.quick:
        parser.error("--plan-for plans for engines of full size, and --quick has small ones")
    try:
        plans = {w: plan(w, options) if options.plan_for else None for w in options.workloads}
    except (SidpError, TypeError) as error:  # a setting of the engines of another type
        parser.error(f"--plan-for {options.plan_for}: {error}")
    options.picks = {w: found and Pick(len(found.resident_layers), found.mode) for w, found in plans.items()}
    # Two workloads with one pick may want other layers (CaS has them in runs): a start has one set, the last one's
    options.resident_layers = {options.picks[w]: found.resident_layers for w, found in plans.items() if found}
    options.begun = time.monotonic()
    if options.quick:
        share = options.gpus / options.replicas if options.gpus else 1.0
        little = {
            "enforce_eager": True,
            "max_model_len": 512,
            "max_num_seqs": 16,
            "kv_cache_memory_bytes": (2 << 30) if options.gpus else (256 << 20),
            "gpu_memory_utilization": 0.85 * share,
        }
        options.engine = {**little, **options.engine}
    return options


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text} is no JSON object")
    return value


def _positive(text: str) -> bool:
    return text.isdecimal() and int(text) > 0


def numbers(workload: str) -> list[int]:
    """Tokens in, tokens out, prompts and, where some are longer, their tokens out."""
    return [int(part) for part in workload.split(":")]


def plan(workload: str, options: argparse.Namespace) -> Plan:
    """The planner's, for these engines and prompts."""
    given: dict[str, Any] = {
        name: options.engine[key]
        for key, name in (("max_num_batched_tokens", "step_tokens"), ("max_num_seqs", "max_sequences"))
        if options.engine.get(key) is not None
    }
    pool = PoolSettings(**{k: options.sidp[k] for k in ("max_rows", "ring_slots") if k in options.sidp})
    memory = MemorySettings(max_rows=pool.max_rows, ring_slots=pool.ring_slots)
    if (utilization := options.engine.get("gpu_memory_utilization")) is not None:
        memory = replace(memory, utilization=utilization)
    shape, gpu = ModelShape.read(options.model), GpuProfile.read(options.plan_for)
    graphs = options.engine.get("compilation_config")
    sizes = graphs.get("cudagraph_capture_sizes") or () if isinstance(graphs, dict) else ()
    planner = Planner(shape, gpu, options.replicas, memory, row_sizes=tuple(sorted(set(sizes))), **given)
    return planner.plan(*job(workload))


def job(workload: str) -> list[Workload]:
    """Its prompts as the planner knows them: as many long ones as are to be expected."""
    length, out, count, *long = numbers(workload)
    num_long = round(LONG_SHARE * count) if long else 0
    parts = [Workload(length, out, count - num_long)]
    return [*parts, Workload(length, long[0], num_long)] if num_long else parts


def starts(system: str, options: argparse.Namespace) -> dict[Pick | None, list[tuple[str, int]]]:
    """For each start of the system in a round, by what was picked: workloads and how often each is sampled."""
    found: dict[Pick | None, list[tuple[str, int]]] = {}
    for workload, repeats in zip(options.workloads, options.repeats, strict=True):
        found.setdefault(e2e_table.picked(options, system, workload), []).append((workload, repeats))
    return found


def order(systems: Sequence[str], number: int) -> list[str]:
    """Of round ``number``: as they were given, rotated, so that each is first, second ... equally often."""
    turn = number % len(systems)
    return [*systems[turn:], *systems[:turn]]


def engine_settings(system: str, options: argparse.Namespace, pick: Pick | None = None) -> list[dict[str, Any]]:
    """For each engine of the system, what ``serve`` is told."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mode = {"mode": system.partition("-")[2] or "auto"}
    pool = {"world_size": options.replicas, "backend": options.backend, "weights": options.weights, **mode}
    if pick is not None:
        pool |= {"resident_layers": options.resident_layers[pick], "mode": pick.mode}
    common = {name: getattr(options, name) for name in ("model", "replicas", "weights", "engine", "gpus")}
    common |= {"system": system, "port": port, "token": secrets.token_hex(16), "pool": {**pool, **options.sidp}}
    return [{**common, "rank": rank} for rank in range(1 if system == "tp" else options.replicas)]


def _measure(
    system: str,
    pick: Pick | None,
    chosen: Sequence[tuple[str, int]],
    options: argparse.Namespace,
    results: Results,
    serve: Serve,
    logs: Path,
    save: Any,
) -> None:
    """Starts the system's engines, runs the chosen workloads, ends them. Results are added as they come."""
    if system == "tp" and 0 < options.gpus < options.replicas:
        results.unavailable[system] = f"NCCL takes no two ranks on one GPU, and there are {options.gpus}"
        return

    def limit() -> float:
        left: float = options.begun + options.limit - time.monotonic()
        if left <= 0:
            raise EngineError(f"no time left: {options.limit:.0f} s were spent")
        return min(float(options.answer_limit), left)

    first_limit = limit()
    if options.cold:
        leave_page_cache(Path(options.model))
    start = time.monotonic()
    results.order.append(system if pick is None else f"{system}, {pick}")
    vocabulary = int(json.loads((Path(options.model) / "config.json").read_text())["vocab_size"])
    settings = engine_settings(system, options, pick)
    engines = Engines(serve, settings, logs)
    grace_s = 0.0  # of engines that failed, or stand beside one that did
    try:
        ready = engines.answers(first_limit)
        results.started(system, pick, time.monotonic() - start, ready)
        for workload, repeats in chosen:
            _sample(engines, len(ready), warm_up(requests(workload, -1, vocabulary), len(ready)), limit())
            for repeat in range(repeats):
                asked = requests(workload, repeat, vocabulary)
                sample = _sample(engines, len(ready), asked, limit())
                results.sampled(system, workload, sample)
                save()
        engines.ask([("close",)] * len(ready), limit())
        grace_s = _GRACE_S
    finally:
        engines.end(grace_s)
        _C.unlink_segments(settings[0]["token"], len(settings))  # on the host: what killed engines shared


def leave_page_cache(folder: Path) -> None:
    """Has the kernel forget the files of a folder, so that the next reader reads the disk. Needs no rights to do so."""
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())  # pages that are not written yet would stay
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


Request = tuple[list[int], int]  # prompt, new tokens


def requests(workload: str, repeat: int, vocabulary: int) -> list[Request]:
    """Of one sample: random prompts, the same for every system."""
    length, short, count, *long = numbers(workload)
    dice = random.Random(f"{workload} {repeat}")
    return [
        ([dice.randrange(vocabulary) for _ in range(length)], long[0] if long and dice.random() < LONG_SHARE else short)
        for _ in range(count)
    ]


def warm_up(asked: list[Request], engines: int) -> list[Request]:
    """A quarter of the prompts, one for each engine at least, with few new tokens."""
    return [(ids, min(new, WARM_UP_TOKENS)) for ids, new in asked[: max(engines, len(asked) // 4)]]


def _sample(engines: Engines, count: int, asked: list[Request], limit_s: float) -> Sample:
    """Deals the requests out and has all engines start at once. ``EngineError`` if one made fewer tokens than asked."""
    dealt = [asked[rank::count] for rank in range(count)]
    engines.ask([("load", part) for part in dealt], limit_s)
    answers = engines.ask([("go",)] * count, limit_s)
    for rank, (part, answer) in enumerate(zip(dealt, answers, strict=True)):
        wanted = [new for _, new in part]
        if answer["tokens"] != wanted:
            raise EngineError(
                f"engine {rank} made {sum(answer['tokens'])} tokens of {sum(wanted)}: is max_model_len below in + out?"
            )
    return Sample(answers)


if __name__ == "__main__":
    sys.exit(main())
