"""Memory as the kernel counts it, of this process and of maps written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

import sidp_runtime as sidp
from sidp_runtime import LayerSpec, TensorSpec, memory

TOKEN = "0123456789abcdef" * 2
PAGE = 4096


class OneRankStore(dict[str, bytes]):
    """Enough of a store for a group of one."""

    def add(self, key: str, amount: int, /) -> int:
        return amount

    def set(self, key: str, value: str | bytes, /) -> None:
        self[key] = value.encode() if isinstance(value, str) else value

    def get(self, key: str, /) -> bytes:  # type: ignore[override]
        return self[key]

    def check(self, keys: list[str], /) -> bool:
        return all(key in self for key in keys)


def test_a_pool_of_this_process() -> None:
    layers = [LayerSpec(f"l{i}", (TensorSpec("w", (256, 1024), "float32"),)) for i in range(3)]
    sizes = [layer.num_bytes for layer in layers]
    with sidp.Group(0, 1, OneRankStore(), deadline_ms=1000) as group:
        placement = sidp.Placement.by_layer(sizes, 1, resident_layers=[2])
        before = memory.report(group.token)
        assert before["pool_rss"] == before["own_pool_rss"] == 0
        with sidp.WeightPool(group, layers, placement) as pool:
            for i in range(3):
                pool.buffer(i)[:] = bytes([i + 1]) * sizes[i]
            report = pool.memory_report()
            assert report["own_pool_rss"] == report["pool_rss"] == report["pool_pss"] == sum(sizes[:2])
            assert report["resident_rss"] - before["resident_rss"] == sizes[2]
            assert report["ring_rss"] == before["ring_rss"]
            assert report["mailbox_rss"] == 0
            assert report["rss"] >= before["rss"]
        after = memory.report(group.token)
    assert after["pool_rss"] == 0, "close() kept the pool mapped"


def smaps(path: str, permissions: str, rss_kib: int, pss_kib: int) -> str:
    return (
        f"7f0000000000-7f0000100000 {permissions} 00000000 00:19 1234   {path}\n"
        f"Size:               1024 kB\nRss:                {rss_kib:5} kB\nPss:                {pss_kib:5} kB\n"
        f"Pss_Dirty:             7 kB\nVmFlags: rd wr mr\n"
    )


def test_maps_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    shm = f"/dev/shm/sidp-{TOKEN}"
    text = "".join(
        [
            smaps(f"{shm}-0-pool (deleted)", "rw-s", 100, 50),
            smaps(f"{shm}-1-pool (deleted)", "r--s", 40, 20),
            smaps(f"{shm}-0-mailbox", "rw-s", 3, 2),
            smaps(f"{shm}-0-control", "rw-s", 1, 1),
            smaps(f"/dev/shm/sidp-{'f' * 32}-0-pool", "rw-s", 999, 999),  # another group
            smaps(f"/memfd:sidp-{TOKEN}-ring (deleted)", "rw-s", 8, 8),
            smaps(f"/memfd:sidp-{TOKEN}-resident (deleted)", "rw-s", 16, 16),
            smaps(f"/memfd:sidp-{'f' * 32}-ring (deleted)", "rw-s", 999, 999),
            smaps("", "rw-p", 1000, 500),
            smaps("/usr/lib/a file with spaces.so", "r-xp", 10, 1),
        ]
    )
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    kib = {name: size // 1024 for name, size in memory.report(TOKEN).items()}
    assert kib == {
        "pool_rss": 140,
        "pool_pss": 70,
        "own_pool_rss": 100,
        "mailbox_rss": 3,
        "ring_rss": 8,
        "resident_rss": 16,
        "rss": 100 + 40 + 3 + 1 + 2 * 999 + 8 + 16 + 1000 + 10,
        "pss": 50 + 20 + 2 + 1 + 2 * 999 + 8 + 16 + 500 + 1,
    }
