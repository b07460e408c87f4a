"""Importing starts nothing and costs little: no torch, no transformers, no thread."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import sidp_runtime

LOOK = """
import json, sys, os
import sidp_runtime
heavy = sorted({"torch", "transformers", "accelerate", "gguf", "safetensors", "hypothesis"} & set(sys.modules))
tasks = [open(f"/proc/self/task/{t}/comm").read().strip() for t in os.listdir("/proc/self/task")]
print(json.dumps({"heavy": heavy, "sidp threads": [t for t in tasks if "sidp" in t],
                  "names": [n for n in sidp_runtime.__all__ if n not in ("Runtime", "Step", "WeightPool")
                            and not hasattr(sidp_runtime, n)],
                  "shm": [n for n in os.listdir("/dev/shm") if str(os.getpid()) in n]}))
"""


def test_importing_starts_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"heavy": [], "sidp threads": [], "names": [], "shm": []}
    assert done.stderr == ""


def test_every_public_name_exists_and_is_typed() -> None:
    for name in sidp_runtime.__all__:
        assert getattr(sidp_runtime, name) is not None
    assert sidp_runtime.Runtime.__name__ == "Runtime"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sidp_runtime.nothing


def test_errors_carry_their_numbers_and_builtin_kinds() -> None:
    from sidp_runtime.errors import DeadlineError, SidpError, UnknownNameError

    error = DeadlineError("late", rank=1, peer=2, layer=3, num_bytes=4, waited_ms=5, expected=6, seen=7)
    assert isinstance(error, SidpError)
    assert isinstance(error, TimeoutError)
    numbers = (error.rank, error.peer, error.layer, error.num_bytes, error.waited_ms, error.expected, error.seen)
    assert numbers == (1, 2, 3, 4, 5, 6, 7)
    assert str(UnknownNameError("plain words")) == "plain words"
    assert SidpError("x").peer is None
