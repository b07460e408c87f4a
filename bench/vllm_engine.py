"""An engine's process of ``bench.e2e_vllm``: plain vLLM or one with a pool."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from sidp_runtime import config


def serve(link: Any, settings: dict[str, Any]) -> None:
    """Target of ``engines.Engines``; ``settings``: of ``e2e_vllm.engine_settings``.

    Messages: ("load", [(prompt ids, new tokens), ...]), ("go",), which generates what was loaded, and ("close",).
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # all engines would choose the same cores
    pooled = settings["system"].startswith("sidp")
    if not pooled:
        os.environ.setdefault("VLLM_PLUGINS", "")  # ours would have CUDA load all kernels at its start
    if settings["gpus"] and settings["system"] != "tp":
        config.put_own_gpu_first(settings["rank"] % settings["gpus"], settings["gpus"])
    llm = _start(settings, pooled)
    cache = llm.llm_engine.vllm_config.cache_config
    load = llm.collective_rpc("sidp_stats")[0]["load"] if pooled else {"setup_seconds": {}}
    link.send(("ok", {"kv_tokens": cache.num_gpu_blocks * cache.block_size, "setup": load["setup_seconds"]}))
    prompts: list[Any] = []
    params: list[Any] = []
    while (message := link.recv())[0] != "close":
        if message[0] == "load":
            prompts, params = _requests(message[1])
            link.send(("ok", None))
            continue
        before = _counters(llm, pooled)
        start = time.monotonic()
        outputs = llm.generate(prompts, params, use_tqdm=False) if prompts else []
        end = time.monotonic()
        counted = {name: value - before[name] for name, value in _counters(llm, pooled).items()}
        tokens = [len(output.outputs[0].token_ids) for output in outputs]
        link.send(("ok", {"start": start, "end": end, "tokens": tokens, **counted}))
    if pooled:
        print(json.dumps(llm.collective_rpc("sidp_stats")[0], default=str), flush=True)  # the log tells why
        llm.collective_rpc("sidp_close")
    link.send(("ok", None))


def _start(settings: dict[str, Any], pooled: bool) -> Any:
    from vllm import LLM

    arguments: dict[str, Any] = {
        "enable_prefix_caching": False,
        "skip_tokenizer_init": not (Path(settings["model"]) / "tokenizer_config.json").exists(),
        **({"tensor_parallel_size": settings["replicas"]} if settings["system"] == "tp" else {}),
        **settings["engine"],
    }
    if pooled:
        from sidp_runtime.integrations.vllm import engine_arguments

        pool = engine_arguments(
            rank=settings["rank"],
            store=f"127.0.0.1:{settings['port']}",
            own={"token": settings["token"]},
            **settings["pool"],
        )
        graphs = {**pool.pop("compilation_config", {}), **arguments.get("compilation_config", {})}
        arguments |= {**pool, **({"compilation_config": graphs} if graphs else {})}
    elif settings["weights"] == "dummy":
        from .made_up import ENGINE_ARGUMENTS

        arguments |= ENGINE_ARGUMENTS
    shown = {name: value for name, value in arguments.items() if name != "model_loader_extra_config"}  # has a secret
    print(f"vllm.LLM(model={settings['model']!r}, {json.dumps(shown)})", flush=True)
    return LLM(model=settings["model"], disable_log_stats=False, **arguments)


def _requests(loaded: list[tuple[list[int], int]]) -> tuple[list[Any], list[Any]]:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": ids} for ids, _ in loaded]
    return prompts, [
        SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False) for _, new in loaded
    ]


def _counters(llm: Any, pooled: bool) -> dict[str, int]:
    """Since the start: what vLLM counts itself, and what the pool does. A pool that was not used raises."""
    metrics = {metric.name: metric for metric in llm.get_metrics()}  # of one engine: each name once
    found = {
        "preemptions": int(metrics["vllm:num_preemptions"].value),
        "steps": int(metrics["vllm:iteration_tokens_total"].count),  # one observation for each step
        **dict.fromkeys(("copied", "requests", "fallbacks"), 0),
    }
    if pooled:
        stats = llm.collective_rpc("sidp_stats")[0]
        found["copied"] = sum(stats["bytes_by_peer"])
        found["requests"] = sum(stats["requests_by_peer"])
        found["fallbacks"] = stats["fallbacks"]
    return found
