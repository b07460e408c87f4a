"""Groups of processes that torchrun starts, and starts anew."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, sys
import sidp_runtime as sidp

group = sidp.Group.from_env()
ranks = [int(rank) for rank in group.all_gather("ranks", str(group.rank).encode())]
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
os.write(1, f"attempt {attempt}: rank {group.rank} saw {ranks}\\n".encode())  # at once: print() may mix lines
group.barrier("seen")
sys.exit(attempt == "0" and group.rank == 1)
"""


def torchrun(script: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    script.write_text(text)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    return subprocess.run([*command, *options, str(script)], capture_output=True, text=True, timeout=120, check=False)


def test_ranks_meet_and_meet_again_after_a_restart(tmp_path: Path) -> None:
    ran = torchrun(tmp_path / "script.py", SCRIPT, "--max-restarts", "1", "--monitor-interval", "0.1")
    seen = sorted(line for line in ran.stdout.splitlines() if line.startswith("attempt"))
    expected = [f"attempt {attempt}: rank {rank} saw [0, 1]" for attempt in (0, 1) for rank in (0, 1)]
    assert (ran.returncode, seen) == (0, expected), ran.stderr


def test_the_example_of_the_readme(tmp_path: Path, repository: Path) -> None:
    (example,) = re.findall(
        r"```python\n(import sidp_runtime as sidp\n.*?)```", (repository / "README.md").read_text(), re.DOTALL
    )
    ran = torchrun(tmp_path / "example.py", example)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("'steps_broken_off': 0") == 2
