"""One figure, then nothing."""

from __future__ import annotations

import time

from bench.rank import RankContext


def run(context: RankContext) -> None:
    context.figure("metric", "sidp", "unit", samples=(1.0,))
    time.sleep(3600)
