"""A group of one, and what a rank can find wrong alone. Several ranks are processes: tests/multiproc, tests/faults."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import sidp_runtime as sidp
from sidp_runtime import _torch
from sidp_runtime.errors import ClosedError, ConfigError, DeadlineError, DuplicateRankError, PeerDeadError


class DictStore:
    """A store of one process; ``before`` is called ahead of each access."""

    def __init__(self, before: Callable[[str], None] = lambda name: None) -> None:
        self.data: dict[str, bytes] = {}
        self.before = before

    def set(self, key: str, value: str | bytes, /) -> None:
        self.before("set")
        self.data[key] = value.encode() if isinstance(value, str) else value

    def get(self, key: str, /) -> bytes:
        self.before("get")
        return self.data[key]

    def add(self, key: str, amount: int, /) -> int:
        self.before("add")
        self.data[key] = str(int(self.data.get(key, b"0")) + amount).encode()
        return int(self.data[key])

    def check(self, keys: list[str], /) -> bool:
        self.before("check")
        return all(key in self.data for key in keys)


def test_a_group_of_one() -> None:
    with sidp.Group(0, 1, DictStore(), deadline_ms=100) as group:
        assert (group.rank, group.world_size, group.backend, group.deadline_ms) == (0, 1, "host", 100)
        assert len(group.token) == 32
        assert group.all_gather("k", b"\x00payload\xff") == [b"\x00payload\xff"]
        group.barrier("b")
    for call in (lambda: group.all_gather("x", b""), lambda: group.barrier("y"), group.make_backend):
        with pytest.raises(ClosedError, match="the group is closed"):
            call()
    group.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_it_runs_on_torchs_file_store(tmp_path: Path, rank: int) -> None:
    store: Any = dist.FileStore(str(tmp_path / "store"), 1)  # type: ignore[attr-defined]
    other = f"sidp/default/token/{1 - rank}"
    store.set(other, b"a" * 32 if rank == 1 else b"")
    group = sidp.Group(rank, 2, store, deadline_ms=100)
    assert (group.token == "a" * 32) == (rank == 1)


def test_tokens_differ_between_groups_and_can_be_given() -> None:
    store = DictStore()
    tokens = {sidp.Group(0, 1, store, name=str(i), deadline_ms=100).token for i in range(5)}
    assert len(tokens) == 5
    assert sidp.Group(0, 1, store, name="mine", token="b" * 40, deadline_ms=100).token == "b" * 40


def test_a_rank_is_claimed_once_a_name() -> None:
    store = DictStore()
    sidp.Group(0, 1, store, deadline_ms=100)
    with pytest.raises(DuplicateRankError, match="rank 0 of group 'default' is taken") as caught:
        sidp.Group(0, 1, store, deadline_ms=100)
    assert caught.value.rank == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rank": 1}, "rank 1 is not one of 0 to 0"),
        ({"rank": -1}, "rank -1 is not one of"),
        ({"world_size": 0}, "rank 0 is not one of"),
        ({"backend": "tcp"}, "backend 'tcp' is not in this build, which has: host"),
        ({"deadline_ms": 0}, "deadline_ms is 0"),
    ],
)
def test_bad_arguments_touch_no_store(arguments: dict[str, Any], words: str) -> None:
    store = DictStore()
    given: dict[str, Any] = {"rank": 0, "world_size": 1, "store": store}
    with pytest.raises(ConfigError, match=words):
        sidp.Group(**(given | arguments))
    assert store.data == {}


@pytest.mark.parametrize("token", ["short", "g" * 32, "A" * 32, "../" + "a" * 32])
def test_a_token_that_is_no_secret_is_refused(token: str) -> None:
    group = sidp.Group(0, 1, DictStore(), token=token, deadline_ms=100)
    with pytest.raises(ConfigError, match="32 hex digits"):
        group.make_backend()


def test_missing_ranks_are_named_within_the_deadline() -> None:
    store = DictStore()
    store.set("sidp/default/token/3", b"")
    start = time.monotonic()
    with pytest.raises(DeadlineError, match=r"rank 1 waited \d+ ms for rank\(s\) 0, 2 at 'token'") as caught:
        sidp.Group(1, 4, store, deadline_ms=60)
    assert 0.06 <= time.monotonic() - start < 3
    error = caught.value
    assert (error.rank, error.peer, error.expected, error.seen) == (1, 0, 4, 2)
    assert isinstance(error, TimeoutError)


@pytest.mark.parametrize("moment", ["add", "set", "check", "get"])
def test_a_store_that_fails_is_a_dead_peer(moment: str) -> None:
    def fail(name: str) -> None:
        if name == moment:
            raise RuntimeError("Connection reset by peer")

    with pytest.raises(PeerDeadError, match=r"rank 0 lost the group's store at .*: Connection reset") as caught:
        sidp.Group(0, 1, DictStore(fail), deadline_ms=100)
    assert caught.value.rank == 0


def test_a_store_that_fails_while_the_missing_are_named_is_a_dead_peer() -> None:
    """The last look at who is missing goes through the store too."""

    class Dying(DictStore):
        def check(self, keys: list[str], /) -> bool:
            if len(keys) == 1:
                raise RuntimeError("Connection reset by peer")
            return super().check(keys)

    with pytest.raises(PeerDeadError, match="lost the group's store"):
        sidp.Group(0, 2, Dying(), deadline_ms=50)


def test_nobody_serves_the_store() -> None:
    with pytest.raises(PeerDeadError, match=r"no store at 127.0.0.1:1 within 200 ms") as caught:
        _torch.connect_store("127.0.0.1", 1, 200)
    assert caught.value.waited_ms == 200


@pytest.mark.parametrize("how", ["made", "master"])
def test_only_this_machine_reaches_a_store_of_ours(how: str) -> None:
    if how == "made":
        _store, host, port = _torch.make_store_server()
    else:
        with socket.create_server(("127.0.0.1", 0)) as free:
            host, port = free.getsockname()
        _store = _torch.connect_store(host, port, 20_000, is_master=True)
    sockets = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    listening = [fields[1] for fields in sockets if fields[3] == "0A" and fields[1].endswith(f":{port:04X}")]
    assert (host, listening) == ("127.0.0.1", [f"0100007F:{port:04X}"])
    with pytest.raises(PeerDeadError, match="Address already in use"):
        _torch.connect_store(host, port, 20_000, is_master=True)


def test_from_env(monkeypatch: pytest.MonkeyPatch) -> None:
    store, host, port = _torch.make_store_server()
    store.set("free", b"1")
    values = {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": host, "MASTER_PORT": port, "SIDP_DEADLINE_MS": 20_000}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    store.set("sidp/default/token/0", "c" * 32)
    group = sidp.Group.from_env()
    assert (group.rank, group.world_size, group.deadline_ms, group.token) == (1, 2, 20_000, "c" * 32)
