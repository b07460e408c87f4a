"""What a rank really holds, read from the kernel (proc(5), ``/proc/pid/smaps``)."""

from __future__ import annotations

import re
from pathlib import Path

_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+\s*(?P<path>.*)$")


def report(token: str, pid: int | str = "self") -> dict[str, int]:
    """Bytes of a process's mappings of one group.

    ``pool_rss``, ``pool_pss``: pages of all ranks' pools that this process has touched, whole and divided by the
    number of processes that share each. The sum of ``pool_pss`` over ranks is what the group's pool occupies.
    ``own_pool_rss``: pages of this rank's own pool, the only one that it maps writable.
    ``ring_rss``, ``resident_rss``: local memory. ``mailbox_rss``: request and reply slots. ``rss``, ``pss``: of the
    whole process.
    """
    totals = {
        name: 0
        for name in (
            "pool_rss",
            "pool_pss",
            "own_pool_rss",
            "ring_rss",
            "resident_rss",
            "mailbox_rss",
            "rss",
            "pss",
        )
    }
    path, writable = "", False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if match := _MAPPING.match(line):
            path, writable = match["path"], "w" in line.split()[1]
            continue
        key, _, rest = line.partition(":")
        if key not in ("Rss", "Pss"):
            continue
        num_bytes = int(rest.split()[0]) * 1024
        kind = key.lower()
        totals[kind] += num_bytes
        if f"sidp-{token}-" in path:
            label = path.split(" ")[0].rsplit("-", 1)[1]
            if f"{label}_{kind}" in totals:
                totals[f"{label}_{kind}"] += num_bytes
            if label == "pool" and kind == "rss" and writable:
                totals["own_pool_rss"] += num_bytes
    return totals
