"""Environment variables: defaults, ranges, and errors that name the variable and the value."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sidp_runtime import config
from sidp_runtime.errors import ConfigError

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in config.SETTINGS:
        monkeypatch.delenv(name, raising=False)


def test_cache_dir_takes_the_first_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert config.cache_dir() == Path("/home/someone/.cache/sidp")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert config.cache_dir() == Path("/home/someone/.cache/sidp")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/xdg")
    assert config.cache_dir() == Path("/var/xdg/sidp")
    monkeypatch.setenv("SIDP_CACHE_DIR", "~/mine")
    assert config.cache_dir() == Path("/home/someone/mine")


@pytest.mark.parametrize("name", ["SIDP_CACHE_DIR", "XDG_CACHE_HOME"])
def test_cache_dir_must_be_absolute(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "here/cache")
    with pytest.raises(ConfigError, match=rf"{name}='here/cache' is not an absolute path"):
        config.cache_dir()


def test_empty_cache_dir_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDP_CACHE_DIR", "")
    with pytest.raises(ConfigError, match=r"SIDP_CACHE_DIR=''"):
        config.cache_dir()


def test_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.deadline_ms() == 30_000
    for text, value in (("10", 10), ("3600000", 3_600_000), ("0050", 50)):
        monkeypatch.setenv("SIDP_DEADLINE_MS", text)
        assert config.deadline_ms() == value


@pytest.mark.parametrize("text", ["9", "3600001", "-5", "1e3", "30_000", " 30", "30\n", "", "٣٠", "9" * 30])
def test_wrong_deadline_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SIDP_DEADLINE_MS", text)
    with pytest.raises(ConfigError) as caught:
        config.deadline_ms()
    assert f"SIDP_DEADLINE_MS={text!r}" in str(caught.value)
    assert "10..3600000 (ms)" in str(caught.value)


def test_rendezvous(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"RANK is not set"):
        config.rendezvous()
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is not set.*1\.\.4096"):
        config.rendezvous()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert config.rendezvous() == config.Rendezvous(1, 2, "127.0.0.1", 29500)
    monkeypatch.setenv("MASTER_ADDR", "node0")
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert config.rendezvous() == config.Rendezvous(1, 2, "node0", 1234)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", "2", r"RANK=2 is not below WORLD_SIZE=2"),
        ("RANK", "x", r"RANK='x'"),
        ("WORLD_SIZE", "0", r"WORLD_SIZE='0'.*1\.\.4096"),
        ("MASTER_PORT", "0", r"MASTER_PORT='0'.*1\.\.65535"),
        ("MASTER_PORT", "65536", r"MASTER_PORT='65536'"),
        ("MASTER_ADDR", "", r"MASTER_ADDR=''"),
        ("MASTER_ADDR", "a b", r"MASTER_ADDR='a b'"),
    ],
)
def test_wrong_rendezvous_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        config.rendezvous()


def test_reported_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.nvshmem_disable_nvls() is None
    monkeypatch.setenv("NVSHMEM_DISABLE_NVLS", "1")
    assert config.nvshmem_disable_nvls() == "1"


def test_nvshmem_makes_no_nccl_communicators_unless_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, expected in ((None, "1"), ("0", "0")):
        monkeypatch.delenv("NVSHMEM_DISABLE_NCCL", raising=False)
        if given is not None:
            monkeypatch.setenv("NVSHMEM_DISABLE_NCCL", given)
        config.prepare_nvshmem()
        assert os.environ["NVSHMEM_DISABLE_NCCL"] == expected
    for name in ("NVSHMEM_DISABLE_NVLS", "NVSHMEM_DISABLE_NCCL"):
        monkeypatch.setenv(name, "yes")
        with pytest.raises(ConfigError, match=f"{name}='yes' is neither 0 nor 1"):
            config.prepare_nvshmem()
        monkeypatch.setenv(name, "0")


def test_an_engines_own_gpu_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, rank, world_size, expected in ((None, 1, 3, "1,2,0"), ("4,6", 1, 2, "6,4"), ("5,6,7", 0, 2, "5,6,7")):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        config.put_own_gpu_first(rank, world_size)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == expected
    for visible in ("0,1", "", "0,,2"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with pytest.raises(ConfigError, match=f"CUDA_VISIBLE_DEVICES='{visible}'"):
            config.put_own_gpu_first(0, 3)


def test_a_jobs_engine_runs_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "all")
    config.prepare_vllm()
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert (os.environ["VLLM_LOGGING_LEVEL"], os.environ["VLLM_CPU_OMP_THREADS_BIND"]) == ("DEBUG", "all")
