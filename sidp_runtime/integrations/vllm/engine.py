"""What an engine's process holds of the pool, and the calls that reach it through ``collective_rpc``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ... import Group, Mode, Runtime, WeightPool
from ..._torch_gpu import Taken
from ...errors import ConfigError, UsageError
from .settings import MODES, Settings
from .step import StepState, set_state


@dataclass
class Engine:
    """One rank of the group."""

    settings: Settings
    group: Group
    pool: WeightPool
    runtime: Runtime
    state: StepState
    load: dict[str, Any]
    taken: Taken
    budgets_asked: int = 0

    def describe(self) -> str:
        """One line for the log: who, what it holds, what it read."""
        memory = self.memory()
        return (
            f"rank {self.settings.rank} of {self.settings.world_size}, mode {self.settings.pool.mode}: "
            f"{memory['owned_bytes']} bytes owned, {memory['ring_bytes']} of ring, {memory['pool_resident_bytes']} "
            f"resident, of {memory['pooled_bytes']} pooled; read {self.load['bytes_read']} of "
            f"{self.load['checkpoint_bytes']} bytes in {self.load['seconds']:.1f} s; of the GPU beside torch's own: "
            + (", ".join(f"{part} {count}" for part, count in self.taken.by_part.items()) or "nothing")
            + "; seconds: "
            + ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.taken.seconds.items())
        )

    def memory(self) -> dict[str, int]:
        """Bytes, computed; on the host also as the kernel counts them, on a GPU what set-up took beside torch's own."""
        placement, rank = self.pool.placement, self.group.rank
        return {
            **(self.pool.memory_report() if self.group.device is None else {}),
            "pooled_bytes": self.pool.pooled_bytes,
            "owned_bytes": placement.pool_bytes(rank),
            "pool_resident_bytes": placement.resident_bytes,
            "ring_bytes": placement.ring_bytes(rank),
            **{f"gpu_{part}_bytes": count for part, count in self.taken.by_part.items()},
        }

    def stats(self) -> dict[str, Any]:
        """Counters of the runtime, with load and memory. ``UsageError`` if steps ran and the pool was not used.

        Raises what ``Runtime.check`` raises: call it before the answers of a GPU are trusted.
        """
        self.runtime.check()
        stats = {
            **self.runtime.stats(),
            "rank": self.group.rank,
            "world_size": self.group.world_size,
            "load": {**self.load, "setup_seconds": self.taken.seconds},
            "memory": self.memory(),
        }
        check_used(stats, len(self.pool.placement.streamed_layers(self.group.rank)))
        return stats

    def smallest_budget(self, own: int) -> int:
        """The smallest of all engines' ``own`` bytes for the KV cache, if they shall be equal.

        Collective; waits as long as engines may take to start.
        """
        if not self.settings.pool.equal_kv:
            return own
        self.budgets_asked += 1  # a key is used once
        gathered = self.group.all_gather(f"kv-budget/{self.budgets_asked}", str(own).encode())
        return min(int(budget) for budget in gathered)

    def end_warm_up(self) -> None:
        """From the next step on modes are chosen, and requests sent. Collective; waits as ``smallest_budget`` does."""
        self.group.barrier("vllm/warm")
        self.state.warming_up = False

    def close(self) -> None:
        """Leaves the group. Other engines go on with this rank's bytes on the host; on a GPU all close together."""
        set_state(None)
        self.runtime.close()
        self.pool.close()
        self.group.close()


def check_used(stats: dict[str, Any], streamed_layers: int) -> None:
    """Steps that moved nothing although layers are streamed: the engine ran on something else, whatever it said."""
    steps = {name.lower(): count for name, count in stats["steps"].items()}
    moved, asked = sum(stats["bytes_by_peer"]), sum(stats["requests_by_peer"])
    unused_was = steps.get("was", 0) > 0 and (moved == 0 or stats["fetches"] == 0)
    unused_cas = steps.get("cas", 0) > 0 and asked == 0 and not stats["fallbacks"]
    if streamed_layers and (unused_was or unused_cas):
        raise UsageError(
            f"{streamed_layers} layers are streamed, but after steps {json.dumps(steps)} {moved} bytes were copied in "
            f"{stats['fetches']} fetches and {asked} requests sent: the pool was configured and not used"
        )


_engine: Engine | None = None


def set_engine(engine: Engine | None) -> None:
    """Makes it the one that ``collective_rpc`` reaches in this process."""
    global _engine
    _engine = engine


def current() -> Engine:
    """This process's engine; ``UsageError`` if it has none."""
    if _engine is None:
        raise UsageError("this process has no vLLM engine with load_format='sidp', or it was closed")
    return _engine


class WorkerExtension:
    """For ``worker_extension_cls``: ``llm.collective_rpc("sidp_stats")`` and the rest."""

    def sidp_stats(self) -> dict[str, Any]:
        """Counters, plain data. ``UsageError`` if a configured pool moved nothing."""
        stats = current().stats()
        _log(stats)
        return stats

    def sidp_pin_mode(self, mode: str) -> None:
        """``was`` or ``cas`` from the next step on; ``auto``: as configured. ``cas`` needs an engine that has it."""
        if mode not in MODES:
            raise ConfigError(f"mode {mode!r} is not one of {', '.join(MODES)}")
        state = current().state
        if mode == "cas" and not state.computes:
            raise ConfigError("this engine was compiled for WaS alone: start it with mode 'auto' or 'cas'")
        state.pin({"auto": None, "was": Mode.WAS, "cas": Mode.CAS}[mode])

    def sidp_close(self) -> None:
        """Leaves the group, with a last ``sidp_stats`` for the log.

        On a GPU collective: peers read this engine's memory until all have called it.
        """
        engine = current()
        try:
            _log(engine.stats())
        finally:
            set_engine(None)
            engine.close()


def _log(stats: dict[str, Any]) -> None:
    from vllm.logger import init_logger

    init_logger(f"vllm.{__name__}").info(
        "sidp: rank %d: steps %s, bytes copied by peer %s, requests by peer %s, served %s, fallbacks %d",
        stats["rank"],
        stats["steps"],
        stats["bytes_by_peer"],
        stats["requests_by_peer"],
        stats["served_by_peer"],
        stats["fallbacks"],
    )
