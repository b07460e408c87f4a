"""The GPUs together: NVLink lanes, NVSHMEM's version and the rates of copies, asked by a child with a deadline."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

#: For all answers of the child, the start of CUDA on every GPU included.
DEADLINE_S = 20.0


@dataclass(frozen=True)
class GpuProbe:
    """A reason says why a list is empty, "" when it is not."""

    nvlinks: list[dict[str, Any]]  # ordinal, lanes (active), gbps (of all lanes together, each way; None: not told)
    nvlinks_reason: str
    copies: list[dict[str, Any]]  # src, dst, direct, gbps; see _C.measure_copies
    copies_reason: str
    nvshmem_version: str | None  # as its library says


def probe_gpus(nvshmem_library: str | None) -> GpuProbe:
    """Asks a child process; comes back within ``DEADLINE_S`` and a bit, whatever the driver does to the child."""
    command = [sys.executable, "-m", f"{__package__}.gpu_probe", nvshmem_library or ""]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = child.communicate(timeout=DEADLINE_S)
        last_words = err.strip().splitlines()[-1:]
        silent = f"the process that asks ended with status {child.returncode}: {''.join(last_words) or 'no message'}"
    except subprocess.TimeoutExpired:
        silent = f"the driver did not answer within {DEADLINE_S:g} s"
        child.kill()
        try:
            out, _ = child.communicate(timeout=1)
        except subprocess.TimeoutExpired:  # held by the driver: it ends when that lets it go
            out = ""
    answers: dict[str, Any] = {}
    for line in out.splitlines():
        try:
            answers |= json.loads(line)
        except ValueError:  # a library's own print, or half a line
            continue
    nvlinks = answers.get("nvlinks", {"reason": silent, "gpus": []})
    copies = answers.get("copies", {"reason": silent, "rates": []})
    return GpuProbe(
        nvlinks=nvlinks["gpus"],
        nvlinks_reason=nvlinks["reason"],
        copies=copies["rates"],
        copies_reason=copies["reason"],
        nvshmem_version=answers.get("nvshmem_version"),
    )
