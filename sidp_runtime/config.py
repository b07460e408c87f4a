"""Every environment variable that the package reads, and the only module that reads them.

A missing variable takes its default, or is a ``ConfigError`` when it has none. One that is present and
wrong is always a ``ConfigError`` with the value seen: nothing is clamped or guessed.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError


@dataclass(frozen=True)
class Setting:
    """One environment variable. ``low`` and ``high`` are inclusive; ``default`` is ``None`` when required."""

    name: str
    meaning: str
    unit: str
    default: str | None
    low: int | None = None
    high: int | None = None

    @property
    def range_text(self) -> str:
        """The allowed values, in words."""
        return "any non-empty text" if self.low is None else f"{self.low}..{self.high}"


# name, meaning, unit, default, lowest, highest
_TABLE = (
    Setting("SIDP_CACHE_DIR", "parsed configurations and tokenizers", "absolute path", "~/.cache/sidp"),
    Setting("XDG_CACHE_HOME", "parent of the cache if SIDP_CACHE_DIR is unset", "absolute path", "~/.cache"),
    Setting("SIDP_DEADLINE_MS", "longest wait for a peer", "ms", "30000", 10, 3_600_000),
    Setting("RANK", "this process in the group (torchrun)", "index", None, 0, 4095),
    Setting("WORLD_SIZE", "processes in the group (torchrun)", "count", None, 1, 4096),
    Setting("MASTER_ADDR", "host of the rendezvous store (torchrun)", "host name", "127.0.0.1"),
    Setting("MASTER_PORT", "port of the rendezvous store (torchrun)", "TCP port", "29500", 1, 65535),
    Setting("TORCHELASTIC_USE_AGENT_STORE", "True: torchrun itself serves the store there", "switch", "False"),
    Setting("TORCHELASTIC_RESTART_COUNT", "how often torchrun has started the ranks anew", "count", "0", 0, 1_000_000),
    Setting("CUDA_MODULE_LOADING", "when CUDA loads kernels (CUDA reads it); see load_kernels_early", "mode", "EAGER"),
    Setting("CUDA_VISIBLE_DEVICES", "the GPUs (CUDA reads it); see put_own_gpu_first", "list", None),
    Setting("VLLM_ENABLE_V1_MULTIPROCESSING", "vLLM's engine in a process of its own (vLLM reads it)", "switch", "0"),
    Setting("VLLM_CPU_OMP_THREADS_BIND", "cores of vLLM's threads on a CPU (vLLM reads it)", "mode", "nobind"),
    Setting("VLLM_LOGGING_LEVEL", "least level of vLLM's log (vLLM reads it)", "level", "ERROR"),
    Setting("SIDP_BENCH_COMMIT", "the commit of a benchmark's copy without its git history", "hexadecimal", None),
    Setting("NVSHMEM_DISABLE_NVLS", "1: NVSHMEM uses no NVLink multicast (NVSHMEM reads it)", "switch", "0"),
    Setting("NVSHMEM_DISABLE_NCCL", "1: NVSHMEM makes no NCCL communicators (NVSHMEM reads it)", "switch", "1"),
)

#: The table by variable name, in reading order.
SETTINGS: dict[str, Setting] = {setting.name: setting for setting in _TABLE}


@dataclass(frozen=True)
class Rendezvous:
    """Where a group meets: ``0 <= rank < world_size``, and the store's address and TCP port.

    ``is_served``: torchrun serves that store, else rank 0 does. ``attempt``: keeps the keys of ranks that torchrun
    started anew apart from those of their predecessors, in a store that lives on.
    """

    rank: int
    world_size: int
    master_addr: str
    master_port: int
    is_served: bool = False
    attempt: int = 0

    @property
    def suffix(self) -> str:
        """For the names of groups of a later attempt."""
        return f"/{self.attempt}" if self.attempt else ""


def _integer(name: str) -> int:
    setting = SETTINGS[name]
    text = os.environ.get(name, setting.default)
    if text is None:
        raise ConfigError(
            f"environment variable {name} is not set: {setting.meaning}, {setting.range_text}; "
            f"start the process with torchrun, or set it"
        )
    assert setting.low is not None
    assert setting.high is not None
    # int() would also take "1_0", " 1 " and other scripts' digits.
    value = int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None
    if value is None or not setting.low <= value <= setting.high:
        raise ConfigError(
            f"environment variable {name}={text!r} is not a whole number in {setting.range_text} ({setting.unit})"
        )
    return value


def _path(name: str, text: str) -> Path:
    path = Path(text)
    if text == "~" or text.startswith("~/"):
        try:
            path = path.expanduser()
        except RuntimeError as error:  # no HOME, no password entry
            raise ConfigError(f"{name}={text!r}: no home directory is known; set SIDP_CACHE_DIR") from error
    if not path.is_absolute():
        # Processes of one job may run in different directories.
        raise ConfigError(f"environment variable {name}={text!r} is not an absolute path")
    return path


def cache_dir() -> Path:
    """Where parsed configurations and tokenizers are kept; not created here.

    ``$SIDP_CACHE_DIR``, else ``$XDG_CACHE_HOME/sidp``, else ``~/.cache/sidp``. Raises ``ConfigError`` for a
    relative or empty path (an empty ``XDG_CACHE_HOME`` counts as unset, as its specification says).
    """
    own = os.environ.get("SIDP_CACHE_DIR")
    if own is not None:
        return _path("SIDP_CACHE_DIR", own)
    shared = os.environ.get("XDG_CACHE_HOME")
    if shared:
        return _path("XDG_CACHE_HOME", shared) / "sidp"
    return _path("SIDP_CACHE_DIR", SETTINGS["SIDP_CACHE_DIR"].default or "")


def deadline_ms() -> int:
    """The longest wait for a peer, in milliseconds (``SIDP_DEADLINE_MS``)."""
    return _integer("SIDP_DEADLINE_MS")


def rendezvous() -> Rendezvous:
    """Rank, world size and store address as torchrun sets them; ``ConfigError`` names a bad variable."""
    rank, world_size = _integer("RANK"), _integer("WORLD_SIZE")
    if rank >= world_size:
        raise ConfigError(
            f"environment variable RANK={rank} is not below WORLD_SIZE={world_size}",
            rank=rank,
            expected=world_size,
        )
    address = os.environ.get("MASTER_ADDR", SETTINGS["MASTER_ADDR"].default or "")
    if not address or any(c.isspace() for c in address):
        raise ConfigError(f"environment variable MASTER_ADDR={address!r} is empty or has white space")
    is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = _integer("TORCHELASTIC_RESTART_COUNT") if is_served else 0
    return Rendezvous(rank, world_size, address, _integer("MASTER_PORT"), is_served, attempt)


def load_kernels_early() -> None:
    """Asks CUDA to load all kernels at its start, unless ``CUDA_MODULE_LOADING`` says otherwise.

    A kernel that is loaded at its first launch makes the launch wait until the device is idle (CUDA programming guide,
    "Lazy Loading"). With CaS a stream may then be waiting for a rank whose own launch waits likewise: both would only
    go on at their deadlines. It has no effect on a process in which CUDA has started already.
    """
    os.environ.setdefault("CUDA_MODULE_LOADING", SETTINGS["CUDA_MODULE_LOADING"].default or "")


def kernels_load_early() -> bool:
    """Whether CUDA loads all kernels into each context that it makes, as far as the environment says."""
    return os.environ.get("CUDA_MODULE_LOADING") == "EAGER"


def check_kernels_early() -> None:
    """``ConfigError`` unless this process's CUDA, which has started, was told to; torch may have told it LAZY."""
    if not kernels_load_early():
        raise ConfigError(
            "CUDA started without CUDA_MODULE_LOADING=EAGER in the environment, so a kernel is loaded at its first "
            "launch: with CaS two ranks that load one at once would wait for each other. Set it before the process "
            "starts, or use mode was"
        )


def prepare_vllm() -> None:
    """Sets what a vLLM engine of an offline job needs; before the engine is made.

    The engine runs in this process, and is quiet, as N of them would drown the job's own report. On a CPU it leaves the
    choice of cores to the system, as all engines would choose the same.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = SETTINGS["VLLM_ENABLE_V1_MULTIPROCESSING"].default or ""
    for name in ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_LOGGING_LEVEL"):
        os.environ.setdefault(name, SETTINGS[name].default or "")


def put_own_gpu_first(rank: int, world_size: int) -> None:
    """Rotates ``CUDA_VISIBLE_DEVICES``, as an engine takes the first GPU that it sees and its peers' must stay visible.

    Before this process starts CUDA. Unset, it means GPUs 0 to ``world_size`` - 1. Engines that share GPUs in turn give
    their number as ``world_size``. ``ConfigError`` if it names too few.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible is not None else [str(ordinal) for ordinal in range(world_size)]
    if len(gpus) < world_size or not all(gpus):
        raise ConfigError(f"CUDA_VISIBLE_DEVICES={visible!r} names {len(gpus)} GPUs for {world_size} engines")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[rank:] + gpus[:rank])


def bench_commit() -> str | None:
    """``SIDP_BENCH_COMMIT``: what a benchmark notes as its commit (``-dirty``: with changes) instead of git's."""
    text = os.environ.get("SIDP_BENCH_COMMIT")
    if text is not None and not re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", text):
        raise ConfigError(f"environment variable SIDP_BENCH_COMMIT={text!r} is not a commit, 7 to 40 of 0-9a-f[-dirty]")
    return text


def prepare_nvshmem() -> None:
    """Sets what NVSHMEM reads at its start. A switch of its that is neither 0 nor 1 is a ``ConfigError``.

    For its collectives, which the pool has no use for, NVSHMEM makes an NCCL communicator for each of its teams where
    torch has loaded NCCL: 1.6 GiB of each of two H200.
    """
    os.environ.setdefault("NVSHMEM_DISABLE_NCCL", SETTINGS["NVSHMEM_DISABLE_NCCL"].default or "")
    for name in ("NVSHMEM_DISABLE_NVLS", "NVSHMEM_DISABLE_NCCL"):
        value = os.environ.get(name)
        if value is not None and value not in ("0", "1"):
            raise ConfigError(f"environment variable {name}={value!r} is neither 0 nor 1")


def nvshmem_disable_nvls() -> str | None:
    """``NVSHMEM_DISABLE_NVLS`` as set, or None; NVSHMEM itself parses it, here it is only reported."""
    return os.environ.get("NVSHMEM_DISABLE_NVLS")
