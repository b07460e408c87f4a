"""An engine of ``bench.e2e_vllm`` without vLLM: it answers as one does, or fails as ``settings["engine"]`` says.

``fail``: {system: how}, one of "start", "exit", "hang" and "short"; ``fail_resident``: only with so many resident
layers. Each starts a child that does not end by itself and writes both processes' numbers to the file ``children``.
``rate``: {system: steps a second that it says it made}.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def serve(link: Any, settings: dict[str, Any]) -> None:
    system, engine = settings["system"], settings["engine"]
    how = engine.get("fail", {}).get(system) if settings["rank"] == 0 else None
    resident = len(settings["pool"].get("resident_layers", ()))
    if resident != engine.get("fail_resident", resident):
        how = None
    stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN);" if how == "exit" else ""
    child = subprocess.Popen([sys.executable, "-c", f"import signal, time; {stubborn} time.sleep(600)"])
    with Path(engine["children"]).open("a") as file:
        file.write(f"{os.getpid()}\n{child.pid}\n")
    if how == "start":
        print("WARNING an OSError: of no account\nCudaError: the first cause", flush=True)
        raise ValueError("no memory")
    pooled = system.startswith("sidp")
    kv_tokens = 1600 - 10 * resident if pooled else 1000
    link.send(("ok", {"kv_tokens": kv_tokens, "setup": {"group": 1.5, "pool": 0.5} if pooled else {}}))
    runs = 0
    loaded: list[tuple[list[int], int]] = []
    while (message := link.recv())[0] != "close":
        if message[0] == "load":
            loaded = message[1]
            link.send(("ok", None))
            continue
        runs += 1
        if runs == 3:  # the second timed sample
            if how == "exit":
                os._exit(7)
            if how == "hang":
                time.sleep(600)
        tokens = [new - (how == "short") for _, new in loaded]
        steps = sum(tokens)
        start = time.monotonic()
        end = start + steps / engine.get("rate", {}).get(system, 1000)
        counted = {"preemptions": 2, "steps": steps, "copied": 10**9, "requests": 0, "fallbacks": 0}
        link.send(("ok", {"start": start, "end": end, "tokens": tokens, **counted}))
    link.send(("ok", None))
