"""A job from its configuration to its report."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import _C, _nvshmem
from ..errors import ConfigError, UnsupportedError
from ..loading import Checkpoint, tokenizer_dir
from .config import JobConfig
from .launcher import Launcher, OnEvent
from .prompts import Batch, Request, Tokenizer, cut, read_prompts, step_rows, todo, tokenise
from .replicas import Replica, Target, start_fork_server
from .report import JobReport, check_pool_was_used, rank_report
from .results import Result, ResultsWriter, digest

_PRELOAD = {
    "transformers": ("sidp_runtime.job.replica_main",),
    "vllm": ("sidp_runtime.job.vllm_replica", "sidp_runtime.integrations.vllm.loader", "vllm.entrypoints.llm"),
}


def run(config: JobConfig, on_event: OnEvent | None = None, *, target: Target | None = None) -> JobReport:
    """Runs the job, or what is left of it. Results are in ``config.out`` when it returns.

    ``on_event``: see ``launcher.OnEvent``. ``target``: what the replica processes run instead (tests).

    Raises ``ConfigError`` for wrong input and ``CheckpointError`` for a wrong model before any replica starts, what a
    replica reports at start-up, ``PeerDeadError`` when no replica is left, ``JobInterrupted`` on SIGINT and SIGTERM,
    and ``UsageError`` when a group of more than one shared nothing. Whatever it raises, finished batches are kept.
    """
    warnings: list[str] = []

    def emit(name: str, *values: Any) -> None:
        if name == "warning":
            warnings.append(values[0])
        if on_event is not None:
            on_event(name, *values)

    config.check_places()
    gpus = _check_backend(config, emit)
    deadline_ms = config.deadline
    prompts = read_prompts(Path(config.prompts))
    checkpoint = Checkpoint.open(config.model)
    if config.engine == "vllm":
        check_vllm()
    start_fork_server(_PRELOAD[config.engine] if target is None else ())
    tokenizer, ends, pad = _tokenizer(checkpoint)
    max_length = checkpoint.config.get("max_position_embeddings")
    requests = tokenise(prompts, tokenizer, max_new_tokens=config.max_new_tokens, max_length=max_length)
    in_vllm = config.engine == "vllm"  # it makes up its own batches
    batches = cut(requests, 1 if in_vllm else config.batch_size)
    dtype = config.dtype if in_vllm else resolve_dtype(config.dtype, checkpoint)
    settings = results_settings(config, checkpoint, requests, dtype, ends, pad)
    with ResultsWriter(
        Path(config.out), settings, [request.id for request in requests], overwrite=config.overwrite
    ) as writer:
        for text in writer.notices:
            emit("notice", text)
        skipped = len(writer.finished)
        left = [batches[index] for index in todo(batches, writer.finished)]
        emit("planned", len(requests), skipped)
        job = _Job(writer, batches, tokenizer, emit)
        if not left:
            emit("notice", f"all {len(requests)} prompts are in {config.out} already")
            return _report(config, dtype, requests, skipped, job, None, [], warnings)
        if len(left) < config.replicas:
            emit("notice", f"{len(left)} batch(es) for {config.replicas} replicas: some will only own layers")
        launcher = Launcher(
            config.replicas,
            {
                "backend": config.backend,
                "checkpoint": checkpoint.to_json(),
                "deadline_ms": deadline_ms,
                "dtype": dtype,
                "mode": config.mode,
                # Of the whole file, so that a job that is taken up again computes as the first run did.
                "step_rows": [config.batch_size] if in_vllm else step_rows(batches),
                "engine_arguments": dict(config.engine_arguments),
                "gpus": gpus,
                "threads": config.threads_per_replica,
                "seed": config.seed,
                "pad_token_id": pad,
                "eos_token_ids": ends,
            },
            left,
            target=target or _real_target(config),
            max_new_tokens=config.max_new_tokens,
            deadline_ms=deadline_ms,
            silence_ms=config.silence_ms,
            # More than it runs together, so that one always waits for the place of one that ends.
            most_held=config.batch_size + (config.batch_size + 3) // 4 if in_vllm else 1,
            on_result=job.write,
            on_event=emit,
        )
        replicas = launcher.run()
    report = _report(config, dtype, requests, skipped, job, launcher, replicas, warnings)
    if config.report is not None:
        report.write(Path(config.report))
    check_pool_was_used(report.ranks)
    return report


class _Job:
    """Turns answers into lines."""

    def __init__(self, writer: ResultsWriter, batches: Sequence[Batch], tokenizer: Tokenizer, emit: OnEvent) -> None:
        self._writer = writer
        self._batches = batches
        self._tokenizer = tokenizer
        self._emit = emit
        self.prompt_tokens = 0
        self.new_tokens = 0

    def write(self, rank: int, index: int, sequences: list[list[int]], finish: list[str]) -> None:
        results = []
        for request, tokens, reason in zip(self._batches[index].requests, sequences, finish, strict=True):
            text = self._tokenizer.decode(tokens)
            results.append(Result(request.id, text, tokens, reason, rank, len(request.input_ids)))
            self.prompt_tokens += len(request.input_ids)
            self.new_tokens += len(tokens)
        self._writer.append(results)
        self._emit("progress", len(self._writer.finished), self.new_tokens)


def _tokenizer(checkpoint: Checkpoint) -> tuple[Tokenizer, list[int], int]:
    """The tokenizer, the tokens that end an answer, and the one that pads."""
    from ..integrations.tokenizer import HfTokenizer

    tokenizer = HfTokenizer(tokenizer_dir(checkpoint))
    ends = tokenizer.eos_token_ids(checkpoint.config)
    return tokenizer, ends, tokenizer.pad_token_id(ends)


def check_vllm() -> None:
    """``UnsupportedError`` if vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise UnsupportedError("vLLM is not installed in this environment; see docs/vllm.md")


def _real_target(config: JobConfig) -> Target:
    from ..policy import ModePolicy

    if config.backend == "host":
        ModePolicy.calibrated()  # measured here at the latest, for it may take longer than replicas wait for another
    if config.engine == "vllm":
        from .vllm_replica import run_vllm_replica

        return run_vllm_replica
    from .replica_main import run_replica

    return run_replica


def _check_backend(config: JobConfig, emit: OnEvent) -> int:
    """GPUs that the replicas run on; 0: the host."""
    if config.backend not in _C.backend_names():
        raise ConfigError(
            f"backend {config.backend!r} is not in this build, which has: {', '.join(_C.backend_names())}"
        )
    if config.backend == "host":
        return 0
    if reason := _nvshmem.missing():
        raise UnsupportedError(f"backend {config.backend!r}: {reason}; see `sidp doctor`")
    gpus = len(_C.cuda_report()["devices"])
    if config.replicas > gpus:
        emit("warning", f"{config.replicas} replicas share {gpus} GPU(s): that works, and saves no memory")
    return min(gpus, config.replicas)


def resolve_dtype(dtype: str, checkpoint: Checkpoint) -> str:
    """``auto`` is bfloat16 where most of the stored bytes are, else float32."""
    if dtype != "auto":
        return dtype
    stored: Counter[str] = Counter()
    for entry in checkpoint.entries.values():
        stored[entry.dtype] += entry.num_bytes
    most = stored.most_common(1)
    return "bfloat16" if most and most[0][0] == "bfloat16" else "float32"


def results_settings(
    config: JobConfig, checkpoint: Checkpoint, requests: Sequence[Request], dtype: str, ends: list[int], pad: int
) -> dict[str, Any]:
    """What the results depend on. Replicas, mode and deadlines are free to change when a job is taken up again.

    The model counts by its headers, sizes and configuration: hashing its weights would take longer than some jobs.
    """
    entries = sorted(
        (e.name, Path(e.file).name, e.offset, e.num_bytes, e.shape, e.dtype) for e in checkpoint.entries.values()
    )
    files = sorted((Path(name).name, size) for name, size in checkpoint.files.items())
    engine = {"engine": config.engine, "engine_arguments": dict(config.engine_arguments)}
    return {
        "backend": config.backend,
        **(engine if config.engine != "transformers" else {}),  # as it was before there was a choice
        "batch_size": config.batch_size,
        "dtype": dtype,
        "eos_token_ids": ends,
        "max_new_tokens": config.max_new_tokens,
        "model": digest([checkpoint.format, files, entries, checkpoint.config]),
        "pad_token_id": pad,
        "prompts": digest([[request.id, request.input_ids] for request in requests]),
        "seed": config.seed,
        "threads_per_replica": config.threads_per_replica,
    }


def _report(
    config: JobConfig,
    dtype: str,
    requests: Sequence[Request],
    skipped: int,
    job: _Job,
    launcher: Launcher | None,
    replicas: Sequence[Replica],
    warnings: list[str],
) -> JobReport:
    return JobReport(
        model=str(config.model),
        out=str(config.out),
        world_size=config.replicas,
        mode=config.mode,
        dtype=dtype,
        batch_size=config.batch_size,
        threads_per_replica=config.threads_per_replica,
        prompts=len(requests),
        prompts_skipped=skipped,
        prompt_tokens=job.prompt_tokens,
        new_tokens=job.new_tokens,
        start_s=launcher.start_s if launcher else 0.0,
        work_s=launcher.work_s if launcher else 0.0,
        restarts=launcher.restarts if launcher else 0,
        ranks=[rank_report(replica) for replica in replicas],
        warnings=warnings,
    )
