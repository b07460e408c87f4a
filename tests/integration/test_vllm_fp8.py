"""The real vLLM on a CPU with an fp8 checkpoint: engines on one copy of what vLLM makes of it, against a plain one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm runs these tests where it is")

from helpers import vllm_fp8
from helpers.vllm_engine import EngineProcess, engines_of

PROMPTS = [[5, 17, 200, 31], [400, 3, 3, 9, 72, 80, 11], [1, 2], [333, 222, 111]]
NEW_TOKENS = 12
KV_BYTES = 16 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vllm_fp8.save_fp8_model(tmp_path_factory.mktemp("fp8"))


@pytest.fixture(scope="module")
def pair(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[EngineProcess]]:
    folder = tmp_path_factory.mktemp("engines")
    with engines_of(model, folder, (KV_BYTES, KV_BYTES), dtype=vllm_fp8.DTYPE, prepare=vllm_fp8.register) as engines:
        for engine in engines:
            engine.answer()
        yield engines


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    log = tmp_path_factory.mktemp("plain") / "plain.log"
    more = {"dtype": vllm_fp8.DTYPE, "kv_cache_memory_bytes": KV_BYTES, "prepare": vllm_fp8.register}
    with EngineProcess(str(model), str(log), **more) as plain:
        plain.answer()
        tokens: list[list[int]] = plain.ask("generate", PROMPTS, NEW_TOKENS)
    assert len({tuple(ids) for ids in tokens}) == len(PROMPTS)
    return tokens


def stored_bytes(model: Path) -> dict[str, int]:
    """Of each tensor in the file."""
    with (model / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {n: t["data_offsets"][1] - t["data_offsets"][0] for n, t in header.items() if n != "__metadata__"}


def test_what_vllm_makes_of_the_weights_is_pooled(pair: list[EngineProcess], model: Path) -> None:
    shapes = vllm_fp8.LINEARS.values()
    stored = stored_bytes(model)
    for rank, engine in enumerate(pair):
        stats = engine.ask("sidp_stats")
        memory, load = stats["memory"], stats["load"]
        weights = sum(rows * columns for rows, columns in shapes)
        scales = sum(4 * rows for rows, _ in shapes)  # one a row, not the file's one a block
        assert memory["pooled_bytes"] == vllm_fp8.LAYERS * (weights + scales)
        owned = memory["owned_bytes"] * vllm_fp8.LAYERS // memory["pooled_bytes"]
        assert owned == 3 - rank
        assert memory["ring_bytes"] == 2 * memory["pooled_bytes"] // vllm_fp8.LAYERS
        linears = sum(size for name, size in stored.items() if name.rpartition(".")[0].endswith("_proj"))
        assert load["checkpoint_bytes"] == sum(stored.values())
        assert load["bytes_read"] == sum(stored.values()) - linears + linears * owned // vllm_fp8.LAYERS
        places = engine.ask(vllm_fp8.weights_of)
        assert {place[0] for place in places} == {"torch.float8_e4m3fn"}
        assert {place[2] for place in places} == {(1, vllm_fp8.INTERMEDIATE)}
        assert {place[3] for place in places} == {"TransposedKernel"}
        assert len({place[1] for place in places}) == owned + 2, "its own layers and the ring"


@pytest.mark.parametrize("mode", ["was", "cas"])
def test_tokens_are_those_of_plain_vllm(pair: list[EngineProcess], expected: list[list[int]], mode: str) -> None:
    before = [engine.ask("sidp_stats") for engine in pair]
    for engine in pair:
        engine.ask("sidp_pin_mode", mode)
        engine.generate(PROMPTS, NEW_TOKENS)
    assert [engine.answer() for engine in pair] == [expected, expected]
    for rank, engine in enumerate(pair):
        stats, streamed = engine.ask("sidp_stats"), 2 + rank
        steps = stats["steps"][mode] - before[rank]["steps"][mode]
        asked = sum(stats["requests_by_peer"]) - sum(before[rank]["requests_by_peer"])
        assert steps == NEW_TOKENS
        assert stats["fetches"] - before[rank]["fetches"] == (steps * streamed if mode == "was" else 0)
        assert asked == (0 if mode == "was" else 3 * steps * streamed)
        assert stats["fallbacks"] == 0
