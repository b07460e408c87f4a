"""Groups of processes that torchrun starts, and starts anew."""

from __future__ import annotations

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
print(f"attempt {attempt}: rank {group.rank} saw {ranks}", flush=True)
group.barrier("seen")
sys.exit(attempt == "0" and group.rank == 1)
"""


def test_ranks_meet_under_torchrun_and_again_after_a_restart(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    command += ["--monitor-interval", "0.1", "--master-port", str(port), str(script)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    seen = sorted(line for line in ran.stdout.splitlines() if line.startswith("attempt"))
    expected = [f"attempt {attempt}: rank {rank} saw [0, 1]" for attempt in (0, 1) for rank in (0, 1)]
    assert (ran.returncode, seen) == (0, expected), ran.stderr
