"""User-space instructions of this thread, as Linux's perf counts them."""

from __future__ import annotations

import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable


def count_instructions(call: Callable[[], object]) -> tuple[int | None, str]:
    """Of one call, what perf itself costs included; or None and why."""
    if (perf := shutil.which("perf")) is None:
        return None, "perf is not installed"
    command = [perf, "stat", "-x", ",", "-e", "instructions:u", "-t", str(threading.get_native_id())]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(0.2)  # until it has attached
        if process.poll() is None:
            call()
            process.send_signal(signal.SIGINT)
        _, text = process.communicate(timeout=10)
    first = text.strip().splitlines()[-1].split(",")[0] if text.strip() else ""
    return (int(first), "") if first.isdigit() else (None, f"perf counts no instructions here: {text.strip()[:120]}")
