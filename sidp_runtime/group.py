"""The replicas that share weights: one process and one device each."""

from __future__ import annotations

import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, TypeVar

from . import _C, config
from .errors import ClosedError, ConfigError, DeadlineError, DuplicateRankError, PeerDeadError, SidpError

T = TypeVar("T")


class Store(Protocol):
    """What a group needs of a key-value store; ``torch.distributed``'s TCPStore and FileStore have it."""

    def set(self, key: str, value: str | bytes, /) -> object: ...
    def get(self, key: str, /) -> bytes: ...
    def add(self, key: str, amount: int, /) -> int: ...
    def check(self, keys: list[str], /) -> bool: ...


class Group:
    """Ranks that set up together. After set-up they never wait for each other.

    ``rank`` is 0 .. ``world_size`` - 1; ``store`` is shared by all ranks and must outlive set-up; ``name`` keeps groups
    that share a store apart; ``deadline_ms`` bounds every wait of set-up and is the default of a runtime's waits;
    ``token`` is the group's secret (32 or more hex digits, the same on all ranks), made by rank 0 if it is not given.
    ``device`` is the ordinal of this rank's GPU for backend "nvshmem", by default torch's current one; NVSHMEM is then
    initialised in this process, once and for all groups of the same ranks.

    Constructing is collective. Raises ``UnsupportedError`` saying what the backend lacks on this machine,
    ``DuplicateRankError`` if the rank is taken, ``DeadlineError`` naming the ranks that did not come.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: Store,
        *,
        backend: str = "host",
        name: str = "default",
        token: str | None = None,
        deadline_ms: int | None = None,
        device: int | None = None,
        test_without_mappings: bool = False,
    ) -> None:
        if world_size < 1 or not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} is not one of 0 to {world_size - 1}", rank=rank)
        if backend not in _C.backend_names():
            known = ", ".join(_C.backend_names())
            raise ConfigError(f"backend {backend!r} is not in this build, which has: {known}; see `sidp doctor`")
        self.rank = rank
        self.world_size = world_size
        self.backend = backend
        self.deadline_ms = config.deadline_ms() if deadline_ms is None else deadline_ms
        if self.deadline_ms < 1:
            raise ConfigError(f"deadline_ms is {self.deadline_ms}, must be at least 1")
        self._store = store
        self._prefix = f"sidp/{name}"
        self._num_pools = 0
        self._num_turns = 0
        self._gpus: list[str] = []  # UUIDs by rank
        self._gpu_ordinals: list[int] = []  # likewise, in this process; -1: not visible to it
        self._closed = False
        # The counter of a rank's claim is 1 for the first process and more for the others.
        if self._ask("claim the rank", lambda: store.add(f"{self._prefix}/claim/{rank}", 1)) != 1:
            raise DuplicateRankError(
                f"rank {rank} of group {name!r} is taken by another process; give each process its own rank",
                rank=rank,
            )
        mine = token or (secrets.token_hex(16) if rank == 0 else "")
        tokens = self.all_gather("token", mine.encode())
        self.token = tokens[0].decode()
        if any(other and other != tokens[0] for other in tokens):
            raise ConfigError("ranks were given different tokens", rank=rank)
        self.device: int | None = None
        self._test_without_mappings = test_without_mappings
        if backend == "nvshmem":
            from . import _nvshmem

            self.device, self._gpus, self._gpu_ordinals = _nvshmem.initialise(self, device)

    @classmethod
    def from_env(cls, *, backend: str = "host", name: str = "default", deadline_ms: int | None = None) -> Group:
        """A group from torchrun's RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; torchrun or rank 0 holds the store.

        Where MASTER_ADDR is 127.0.0.1 or localhost, rank 0's store is for processes of this machine alone.
        """
        from . import _torch

        where = config.rendezvous()
        deadline = config.deadline_ms() if deadline_ms is None else deadline_ms
        is_master = where.rank == 0 and not where.is_served
        store = _torch.connect_store(where.master_addr, where.master_port, deadline, is_master=is_master)
        return cls(where.rank, where.world_size, store, backend=backend, name=name + where.suffix, deadline_ms=deadline)

    def all_gather(self, key: str, payload: bytes) -> list[bytes]:
        """Every rank's payload, by rank. Collective; each key is used once. For set-up, never in a step."""
        self._check_open()
        keys = [f"{self._prefix}/{key}/{rank}" for rank in range(self.world_size)]
        start = time.monotonic()
        self._ask(key, lambda: self._store.set(keys[self.rank], payload))
        pause = 0.0005
        while not self._ask(key, lambda: self._store.check(keys)):
            waited_ms = int((time.monotonic() - start) * 1000)
            if waited_ms > self.deadline_ms:
                missing = self._ask(key, lambda: [r for r, k in enumerate(keys) if not self._store.check([k])])
                raise DeadlineError(
                    f"rank {self.rank} waited {waited_ms} ms for rank(s) {', '.join(map(str, missing))} at "
                    f"{key!r}; they did not start, died, or stopped at an error of their own",
                    rank=self.rank,
                    peer=missing[0] if missing else None,
                    waited_ms=waited_ms,
                    expected=self.world_size,
                    seen=self.world_size - len(missing),
                )
            time.sleep(pause)
            pause = min(pause * 2, 0.01)
        return self._ask(key, lambda: [self._store.get(k) for k in keys])

    def barrier(self, key: str) -> None:
        """Returns once every rank has called it with this key. For set-up, never in a step."""
        self.all_gather(key, b"")

    def in_turns(self, work: Callable[[], T]) -> T:
        """``work``, one rank after the other: several at once would measure each other. Collective.

        If it fails on a rank, that one raises its error and the others ``SidpError`` with its words, at once.
        """
        self._num_turns += 1
        for turn in range(self.world_size):
            words, failure = b"", None
            if turn == self.rank:
                try:
                    result = work()
                except Exception as error:
                    words, failure = f"{type(error).__name__}: {error}".encode(), error
            words = self.all_gather(f"turns{self._num_turns}/{turn}", words)[turn]
            if failure is not None:
                raise failure
            if words:
                raise SidpError(f"rank {turn} failed in its turn: {words.decode()}", rank=self.rank, peer=turn)
        return result

    def shares_gpu(self, peer: int) -> bool:
        """Whether that rank runs on this rank's GPU, by UUID; False on the host."""
        return bool(self._gpus) and self._gpus[peer] == self._gpus[self.rank]

    @property
    def gpu_is_shared(self) -> bool:
        """Whether ranks share GPUs, as NVSHMEM has it on all of them or none; False on the host."""
        return len(set(self._gpus)) < len(self._gpus)

    def make_backend(self) -> _C.Backend:
        """A backend of its own for one pool. All ranks make their pools in the same order."""
        self._check_open()
        pool = self._num_pools
        self._num_pools += 1
        calls: Counter[str] = Counter()

        def all_gather(key: str, payload: bytes) -> list[bytes]:
            calls[key] += 1  # a call that failed is made again under a key of its own
            return self.all_gather(f"pool{pool}/{key}/{calls[key]}", payload)

        return _C.make_backend(
            self.backend,
            self.rank,
            self.world_size,
            self.token,
            all_gather,
            device=-1 if self.device is None else self.device,
            gpus=self._gpu_ordinals,
            deadline_ms=self.deadline_ms,
            test_without_mappings=self._test_without_mappings,
        )

    def close(self) -> None:
        """No collective follows. Pools and runtimes live on; close them first."""
        self._closed = True

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the group is closed", rank=self.rank)

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        """A call of the store within the deadline: torch's own calls block for ever on a server that was stopped."""
        answers: list[T] = []
        errors: list[Exception] = []
        over = threading.Event()

        def ask() -> None:
            try:
                answers.append(call())
            except Exception as error:
                errors.append(error)
            over.set()

        threading.Thread(target=ask, daemon=True).start()
        answered = over.wait(self.deadline_ms / 1000)
        if answers:
            return answers[0]
        why = errors[0] if errors else f"no answer within {self.deadline_ms} ms"
        raise PeerDeadError(
            f"rank {self.rank} lost the group's store at {what!r}: {why}; the process that holds it has ended or hangs",
            rank=self.rank,
            waited_ms=None if answered else self.deadline_ms,
        ) from (errors[0] if errors else None)
