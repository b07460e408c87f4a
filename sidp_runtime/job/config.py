"""What a job is asked to do."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import config as environment
from ..errors import ConfigError

ENGINES = ("transformers", "vllm")
MODES = ("auto", "was", "cas")
DTYPES = ("float32", "bfloat16", "auto")

#: Arguments of ``vllm.LLM`` that a job sets itself, and what to say instead.
OWN_ENGINE_ARGUMENTS = {
    "model": "--model",
    "dtype": "--dtype",
    "seed": "--seed",
    "disable_log_stats": "nothing, as the job reports",
    "load_format": "nothing, as it is 'sidp'",
    "model_loader_extra_config": "--deadline-ms",
    "additional_config": "--replicas, --backend, --mode and --batch-size",
    "worker_cls": "nothing, as the pool needs its own",
    "worker_extension_cls": "nothing, as the pool needs its own",
}

# name, lowest, highest
_RANGES = (
    ("replicas", 1, 4096),
    ("batch_size", 1, 65536),
    ("max_new_tokens", 1, 1 << 24),
    ("threads_per_replica", 1, 4096),
    ("deadline_ms", 10, 3_600_000),
    ("silence_ms", 100, 86_400_000),
    ("seed", 0, (1 << 63) - 1),
)


@dataclass(frozen=True)
class JobConfig:
    """An offline job. Only values are checked here; files are looked at by ``run``.

    ``model``: directory or ``.gguf`` file. ``dtype``: of weights and arithmetic; ``auto`` is bfloat16 for a model that
    is stored so, else float32. ``threads_per_replica``: like ``batch_size``, it can change the last bits of the
    arithmetic, ``replicas`` and ``mode`` do not; its default therefore depends on nothing.
    ``deadline_ms``: longest wait of a replica for a peer (default ``SIDP_DEADLINE_MS``). ``silence_ms``: a replica
    that loads or generates and gives no sign of progress for so long is taken for dead. ``seed``: of torch's
    generator in each replica; greedy decoding draws nothing from it.

    ``engine``: what runs the model. With ``vllm`` ``engine_arguments`` go to ``vllm.LLM`` (``OWN_ENGINE_ARGUMENTS`` are
    refused, ``compilation_config`` is merged), ``batch_size`` is the sequences that an engine runs together, each
    prompt is handed out and answered alone, and a ``dtype`` of ``auto`` is vLLM's choice.

    Raises ``ConfigError`` for a value outside its range.
    """

    model: str | os.PathLike[str]
    prompts: str | os.PathLike[str]
    out: str | os.PathLike[str]
    replicas: int
    backend: str = "host"
    mode: str = "auto"
    batch_size: int = 4
    max_new_tokens: int = 64
    dtype: str = "auto"
    threads_per_replica: int = 1
    deadline_ms: int | None = None
    silence_ms: int = 600_000
    seed: int = 0
    overwrite: bool = False
    report: str | os.PathLike[str] | None = None
    engine: str = "transformers"
    engine_arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ConfigError(f"engine {self.engine!r} is not one of {', '.join(ENGINES)}")
        if self.engine_arguments and self.engine != "vllm":
            raise ConfigError("engine_arguments are vLLM's; give them with engine 'vllm'")
        if own := sorted(set(self.engine_arguments) & set(OWN_ENGINE_ARGUMENTS)):
            words = "; ".join(f"{name}: give {OWN_ENGINE_ARGUMENTS[name]}" for name in own)
            raise ConfigError(f"engine_arguments holds what the job sets itself ({words})")
        if not isinstance(self.engine_arguments.get("compilation_config", {}), (dict, int)):
            raise ConfigError("engine_arguments: compilation_config must be a JSON object, or a number (vLLM's mode)")
        if self.mode not in MODES:
            raise ConfigError(f"mode {self.mode!r} is not one of {', '.join(MODES)}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{name} is {value}, must be in {low}..{high}")

    @property
    def deadline(self) -> int:
        """Milliseconds; from the environment if it was not given."""
        return environment.deadline_ms() if self.deadline_ms is None else self.deadline_ms

    def check_places(self) -> None:
        """The folders of what will be written exist; ``ConfigError`` before minutes of work are lost."""
        for what, path in (("out", Path(self.out)), ("report", None if self.report is None else Path(self.report))):
            if path is None:
                continue
            if path.is_dir():
                raise ConfigError(f"--{what} {path} is a directory: give a file")
            if not path.absolute().parent.is_dir():
                raise ConfigError(f"--{what} {path}: its directory {path.absolute().parent} does not exist: make it")
            if path.exists() and Path(self.prompts).exists() and path.samefile(self.prompts):
                raise ConfigError(f"--{what} {path} is the prompts file: give another")
