"""Offline jobs: a prompts file in, a results file out, N replicas on one copy of the weights.

    report = run(JobConfig(model="model-dir", prompts="prompts.jsonl", out="out.jsonl", replicas=2))

The launcher never holds weights. It cuts the prompts into fixed batches and hands them to replica processes, which
answer over pipes in JSON; a replica that dies loses nothing, and a job that is stopped is taken up where it was.
Replicas are made by ``multiprocessing``: a script that calls ``run`` needs the usual ``if __name__ == "__main__"``.
"""

from .config import JobConfig
from .launcher import JobInterrupted
from .report import JobReport, RankReport
from .runner import run

__all__ = ["JobConfig", "JobInterrupted", "JobReport", "RankReport", "run"]
