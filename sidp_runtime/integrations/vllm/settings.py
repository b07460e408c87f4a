"""What an engine is told: ``additional_config["sidp"]``, equal on all ranks, and ``model_loader_extra_config``.

vLLM keys its compile cache by ``additional_config`` but not by the load format: without the entry an engine with a pool
would load graphs that were compiled without one. What differs from rank to rank is in the loader's extra configuration,
and where vLLM compiles nothing is left there but what shapes the graphs: ``key_graphs``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ... import config as environment
from ...errors import ConfigError

#: To be raised with every change of the operators in the graphs, or of where they are put (``step.py``, ``loader.py``).
OPS_VERSION = 3

MODES = ("auto", "was", "cas")
WEIGHTS = ("checkpoint", "dummy")


@dataclasses.dataclass(frozen=True)
class PoolSettings:
    """``additional_config["sidp"]``: the same on every rank.

    ``world_size``: engines that share the weights; None: ``WORLD_SIZE``, as torchrun sets it. ``mode``: ``was``
    compiles to vLLM's own linears; ``auto`` and ``cas`` put an operator around each but in resident layers.
    ``max_rows``: tokens of the largest CaS step. ``resident_layers``: decoder layers that every rank keeps.
    ``weights``: ``dummy`` makes them up, each from its name. ``equal_kv``: all engines take the smallest KV budget
    among them.
    """

    world_size: int | None = None
    backend: str = "host"
    mode: str = "auto"
    max_rows: int = 256
    ring_slots: int = 2
    resident_layers: tuple[int, ...] = ()
    weights: str = "checkpoint"
    equal_kv: bool = True

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"mode {self.mode!r} is not one of {', '.join(MODES)}")
        if self.weights not in WEIGHTS:
            raise ConfigError(f"weights {self.weights!r} is not one of {', '.join(WEIGHTS)}")
        for name in ("max_rows", "ring_slots"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, must be a whole number of at least 1")
        object.__setattr__(self, "resident_layers", tuple(self.resident_layers))


@dataclasses.dataclass(frozen=True)
class RankSettings:
    """``model_loader_extra_config``: what is this engine's own.

    ``rank``: None: vLLM's ``data_parallel_index`` where ``AsyncLLM`` or ``serve`` starts the engines, else ``RANK``.
    ``store``: ``host:port`` of the group's store; None: ``MASTER_ADDR`` and ``MASTER_PORT``. ``serve_store``: whether
    rank 0 holds it, unless torchrun does. ``token``: see ``Group``. ``setup_ms``: longest wait for another engine to
    start, compile or load. ``deadline_ms``: longest wait of a step; None: ``SIDP_DEADLINE_MS``.
    """

    rank: int | None = None
    store: str | None = None
    serve_store: bool = True
    token: str | None = None
    name: str = "vllm"
    setup_ms: int = 900_000
    deadline_ms: int | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """Both, with what was left open filled in."""

    pool: PoolSettings
    own: RankSettings
    rank: int
    world_size: int
    host: str
    port: int


def read(vllm_config: Any) -> Settings:
    """The settings in a ``VllmConfig``. ``ConfigError`` names what is missing or unknown."""
    additional = vllm_config.additional_config
    entry = additional.get("sidp") if isinstance(additional, Mapping) else None
    if not isinstance(entry, Mapping):
        raise ConfigError(
            "load_format='sidp' needs additional_config={'sidp': {...}} (it may be empty): without it the compile "
            "cache cannot tell this engine from one without a pool; use sidp_runtime.integrations.vllm.engine_arguments"
        )
    pool = _parse(PoolSettings, entry, "additional_config['sidp']")
    own = _parse(RankSettings, vllm_config.load_config.model_loader_extra_config or {}, "model_loader_extra_config")
    index = int(vllm_config.parallel_config.data_parallel_index)
    rank = own.rank if own.rank is not None else index or None
    world_size, where = pool.world_size, None
    if rank is None or world_size is None or own.store is None:
        where = _rendezvous(pool, own, rank)
        rank = where.rank if rank is None else rank
        world_size = where.world_size if world_size is None else world_size
    host, port = _store(own.store) if own.store is not None else ("", 0)
    if where is not None and own.store is None:
        host, port = where.master_addr, where.master_port
        own = dataclasses.replace(
            own, serve_store=own.serve_store and not where.is_served, name=own.name + where.suffix
        )
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} is not one of 0 to {world_size - 1}", rank=rank)
    return Settings(pool, own, rank, world_size, host, port)


def key_graphs(vllm_config: Any, pool: PoolSettings) -> None:
    """In what vLLM keys its compile cache by, has what shapes the graphs stand for the pool's settings.

    Before vLLM compiles, and once the settings were read. How many rows a request holds, say, shapes no graph: an
    engine that holds others finds what was compiled. Which operators this version calls, in which layers, does.
    """
    shape = {
        "ops_version": OPS_VERSION,
        "computes": pool.mode != "was",
        "resident_layers": sorted(set(pool.resident_layers)),
    }
    others = {name: value for name, value in vllm_config.additional_config.items() if name != "sidp"}
    vllm_config.additional_config = {**others, "sidp_graph": shape}


def _rendezvous(pool: PoolSettings, own: RankSettings, rank: int | None) -> environment.Rendezvous:
    if pool.world_size == 1:  # alone: nobody to find
        return environment.Rendezvous(0, 1, "127.0.0.1", 0)
    try:
        return environment.rendezvous()
    except ConfigError as error:
        missing = [
            name
            for name, value in (("rank", rank), ("world_size", pool.world_size), ("store", own.store))
            if value is None
        ]
        raise ConfigError(f"{', '.join(missing)} not given in the settings, and {error}") from error


def _store(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"store {text!r} is not host:port")
    return host, int(port)


def _parse(kind: type[Any], given: Mapping[str, Any], where: str) -> Any:
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(set(given) - known):
        raise ConfigError(f"{where} has unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return kind(**given)
