"""One figure below its bar, and one with a bar for more GPUs than any machine has."""

from __future__ import annotations

from bench.harness import Bar
from bench.rank import RankContext


def run(context: RankContext) -> None:
    context.figure("held", "sidp", "unit", samples=(1.0,), bar=Bar(2.0, at_least=True))
    context.figure("not_held", "sidp", "unit", samples=(1.0,), bar=Bar(2.0, at_least=True, gpus=1000))
