"""Plain data parallelism, tensor parallelism and SiDP in vLLM, side by side: KV tokens an engine and tokens a second.

    python -m bench.e2e_vllm --model DIR --systems dp,tp,sidp --workloads 1024:128:512 --json out.json

Every system runs every workload in turn, ``--repeats`` times, with made-up or stored weights; answers are greedy and of
fixed length. A system's engines are processes of their own, started once; its prompts are dealt out evenly.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import socket
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .environment import environment
from .harness import OWN, Figure, Report, render

START_S = 1800.0
RUN_S = 3600.0


def main() -> None:
    """The command."""
    options = _options()
    command = " ".join(["python -m bench.e2e_vllm", *sys.argv[1:]])
    report = Report(command, options.backend, Path(options.model).name, environment())
    for system in options.systems.split(","):
        report.figures += measure(system, options)
    from rich.console import Console

    render(report.figures, Console())
    if options.json is not None:
        report.write(options.json)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--systems", default="dp,tp,sidp", help="of dp, tp, sidp (auto), sidp-was, sidp-cas")
    parser.add_argument("--replicas", type=int, default=2, help="engines of dp and sidp, GPUs of tp")
    parser.add_argument("--workloads", default="1024:128:512", help="in:out:prompts[:long out for 5 %% of them],...")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--backend", default="host", help="sidp's: host or nvshmem")
    parser.add_argument("--weights", default="checkpoint", choices=("checkpoint", "dummy"))
    parser.add_argument("--sidp", default="{}", help="more settings of the pool, a JSON object")
    parser.add_argument("--engine", default="{}", help="arguments of vllm.LLM for all, a JSON object")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def measure(system: str, options: argparse.Namespace) -> list[Figure]:
    """Starts the system's engines, runs the workloads, ends them."""
    engines = 1 if system == "tp" else options.replicas
    vocabulary = int(json.loads((Path(options.model) / "config.json").read_text())["vocab_size"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    links, processes = [], []
    start = time.perf_counter()
    try:
        for rank in range(engines):
            mine, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, system, rank, port, vars(options)))
            process.start()
            theirs.close()
            links.append(mine)
            processes.append(process)
        ready = [_answer(link, START_S) for link in links]
        figures = [
            _figure(system, "start", "s", [time.perf_counter() - start], False),
            _figure(system, "kv_of_an_engine", "tokens", [r["kv_tokens"] for r in ready], True),
        ]
        for workload in options.workloads.split(","):
            samples = [_run(links, workload, repeat, vocabulary) for repeat in range(options.repeats)]
            figures.append(_figure(system, "throughput", "tokens/s", samples, True, workload=workload))
        for link in links:
            link.send(("close",))
        for rank, link in enumerate(links):
            moved = _answer(link, START_S)
            if system.startswith("sidp"):
                figures.append(_figure(system, "copied", "bytes", [moved], None, rank=rank))
        return figures
    finally:
        for process in processes:
            process.join(30)
            if process.is_alive():
                process.kill()


def _figure(
    system: str, metric: str, unit: str, samples: list[float], higher_is_better: bool | None, **parameters: int | str
) -> Figure:
    subject = OWN if system == "sidp" else system.replace("-", "_")
    return Figure("e2e_vllm", metric, subject, unit, parameters, tuple(samples), higher_is_better)


def _run(links: list[Any], workload: str, repeat: int, vocabulary: int) -> float:
    """New tokens a second of all engines together, from the first prompt to the last answer."""
    length, short, count, *long = (int(part) for part in workload.split(":"))
    dice = random.Random(f"{workload} {repeat}")
    requests = [
        ([dice.randrange(vocabulary) for _ in range(length)], long[0] if long and dice.random() < 0.05 else short)
        for _ in range(count)
    ]
    start = time.perf_counter()
    for rank, link in enumerate(links):
        link.send(("run", requests[rank :: len(links)]))
    for link in links:
        _answer(link, RUN_S)
    return sum(new for _, new in requests) / (time.perf_counter() - start)


def _answer(link: Any, limit_s: float) -> Any:
    if not link.poll(limit_s):
        raise TimeoutError(f"an engine gave no answer for {limit_s:.0f} s")
    kind, value = link.recv()
    if kind == "error":
        raise RuntimeError(f"an engine failed: {value}")
    return value


def serve(link: Connection, system: str, rank: int, port: int, options: dict[str, Any]) -> None:
    """An engine's process."""
    try:
        _serve(link, system, rank, port, options)
    except Exception as error:
        link.send(("error", f"{type(error).__name__}: {error}"))


def _serve(link: Connection, system: str, rank: int, port: int, options: dict[str, Any]) -> None:
    replicas = options["replicas"]
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(replicas)))).split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[rank:] + gpus[:rank])  # an engine takes the first it sees
    from vllm import LLM, SamplingParams

    from sidp_runtime.integrations.vllm import engine_arguments

    arguments: dict[str, Any] = {
        "enable_prefix_caching": False,
        "skip_tokenizer_init": not (Path(options["model"]) / "tokenizer_config.json").exists(),
        "load_format": "dummy" if options["weights"] == "dummy" else "auto",
        **({"tensor_parallel_size": replicas} if system == "tp" else {}),
        **json.loads(options["engine"]),
    }
    if system.startswith("sidp"):
        pool = engine_arguments(
            rank=rank,
            store=f"127.0.0.1:{port}",
            world_size=replicas,
            backend=options["backend"],
            mode=system.partition("-")[2] or "auto",
            weights=options["weights"],
            **json.loads(options["sidp"]),
        )
        graphs = {**arguments.get("compilation_config", {}), **pool.pop("compilation_config", {})}
        arguments |= {**pool, **({"compilation_config": graphs} if graphs else {})}
    llm = LLM(model=options["model"], disable_log_stats=True, **arguments)
    cache = llm.llm_engine.vllm_config.cache_config
    link.send(("ready", {"kv_tokens": cache.num_gpu_blocks * cache.block_size}))
    while True:
        kind, *values = link.recv()
        if kind == "close":
            break
        prompts = [{"prompt_token_ids": ids} for ids, _ in values[0]]
        params = [
            SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False) for _, new in values[0]
        ]
        llm.generate(prompts, params, use_tqdm=False)
        link.send(("done", None))
    moved = 0
    if system.startswith("sidp"):
        moved = sum(llm.collective_rpc("sidp_stats")[0]["bytes_by_peer"])
        llm.collective_rpc("sidp_close")
    link.send(("closed", moved))


if __name__ == "__main__":
    main()
