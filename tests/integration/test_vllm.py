"""The real vLLM on a CPU: SmolLM2-135M-Instruct, engines on one copy of the weights against plain ones."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm runs these tests where it is")

from helpers import static_graphs
from helpers.vllm_engine import COMMON, EngineProcess, engines_of
from helpers.vllm_model import save_real_model

from sidp_runtime import Mode
from sidp_runtime.integrations.tokenizer import HfTokenizer
from sidp_runtime.job import JobConfig, run

TEXTS = (
    "The capital of France is",
    "Once upon a time there was a small dragon who",
    "def add(a, b):",
    "Water boils at",
    "A prime number is",
    "The three primary colours are red,",
)
NEW_TOKENS = 10
KV_BYTES = (96 << 20, 64 << 20)  # of the engines of the pair
LAYERS, STREAMED = 30, 15
RESIDENT = [0, 7, 8, LAYERS - 1]


def cut_engines(model: Path, folder: Path, **pool: Any) -> contextlib.AbstractContextManager[list[EngineProcess]]:
    """Two engines whose graphs are cut as piecewise CUDA graphs are."""
    more = {"enforce_eager": False, "compilation_config": static_graphs.CONFIG}
    return engines_of(model, folder, KV_BYTES, pool, environment=static_graphs.ENVIRONMENT, **more)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_real_model(tmp_path_factory.mktemp("smollm2"), "float32")


@pytest.fixture(scope="module")
def prompts(model: Path) -> list[list[int]]:
    tokenizer = HfTokenizer(str(model))
    return [tokenizer.encode(text) for text in TEXTS]


@dataclass
class Pair:
    """Two engines that share the weights, and what plain vLLM answers to all prompts and to the last two."""

    engines: list[EngineProcess]
    blocks: list[int]
    expected: list[list[list[int]]]
    loads: tuple[list[list[int]], list[list[int]]]

    def check(self) -> None:
        """Unequal load: one engine has the work of three and the other is done early."""
        for engine, load in zip(self.engines, self.loads, strict=True):
            engine.generate(load, NEW_TOKENS)
        assert [engine.answer() for engine in self.engines] == self.expected

    def stats(self) -> list[dict[str, Any]]:
        return [engine.ask("sidp_stats") for engine in self.engines]

    def pin(self, mode: str) -> None:
        for engine in self.engines:
            engine.ask("sidp_pin_mode", mode)


@pytest.fixture(scope="module")
def pair(model: Path, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("engines")
    loads = (prompts, prompts[-2:])
    with engines_of(model, folder, KV_BYTES) as engines:
        with EngineProcess(str(model), str(folder / "plain.log"), kv_cache_memory_bytes=KV_BYTES[0]) as plain:
            blocks = [plain.answer(), *(engine.answer() for engine in engines)]
            expected = []
            for load in loads:
                plain.generate(load, NEW_TOKENS)
                expected.append(plain.answer())
        yield Pair(engines, blocks, expected, loads)


def test_each_engine_reads_and_holds_its_share(pair: Pair) -> None:
    for engine in pair.engines:
        stats = engine.ask("sidp_stats")
        load, memory = stats["load"], stats["memory"]
        resident = load["checkpoint_bytes"] - memory["pooled_bytes"]
        assert memory["owned_bytes"] * 2 == memory["pooled_bytes"]
        assert load["bytes_read"] == memory["owned_bytes"] + resident  # what every rank keeps is read by all
        assert set(load["setup_seconds"]) == {"group", "model", "pool", "profile", "runtime"}
        assert memory["ring_bytes"] == 2 * memory["pooled_bytes"] // LAYERS
        assert memory["own_pool_rss"] <= memory["owned_bytes"]
        assert "sidp: rank" in engine.output()


def test_kv_budget_is_the_smallest_of_all(pair: Pair) -> None:
    plain, *pooled = pair.blocks
    assert pooled[0] == pooled[1] == plain * KV_BYTES[1] // KV_BYTES[0]


def test_was_gives_the_tokens_of_plain_vllm(pair: Pair) -> None:
    pair.pin("was")
    before = pair.stats()
    pair.check()
    for was, stats in zip(before, pair.stats(), strict=True):
        steps = stats["steps"]["was"] - was["steps"]["was"]
        assert steps == NEW_TOKENS
        assert stats["fetches"] - was["fetches"] == steps * STREAMED
        assert stats["requests_by_peer"] == was["requests_by_peer"]
        moved = sum(stats["bytes_by_peer"]) - sum(was["bytes_by_peer"])
        assert moved >= (steps - 1) * stats["memory"]["owned_bytes"]


def test_cas_gives_the_tokens_of_plain_vllm(pair: Pair) -> None:
    pair.pin("cas")
    before = pair.stats()
    pair.check()
    for was, stats in zip(before, pair.stats(), strict=True):
        steps = stats["steps"]["cas"] - was["steps"]["cas"]
        assert steps == NEW_TOKENS
        assert sum(stats["requests_by_peer"]) - sum(was["requests_by_peer"]) == steps * STREAMED * 3
        assert stats["fetches"] == was["fetches"]
        assert stats["fallbacks"] == 0
    assert all(sum(stats["served_by_peer"]) > 0 for stats in pair.stats())


def test_a_killed_engine_does_not_stop_the_other(pair: Pair) -> None:
    """The last test of the pair: in CaS, then in WaS, and its memory is still there."""
    pair.pin("cas")
    survivor, victim = pair.engines
    served = sum(survivor.ask("sidp_stats")["requests_by_peer"])
    survivor.generate(pair.loads[0], NEW_TOKENS)
    time.sleep(0.2)  # a step or more
    victim.kill()
    assert survivor.answer() == pair.expected[0]
    stats = survivor.ask("sidp_stats")
    assert stats["fallbacks"] > 0
    assert sum(stats["requests_by_peer"]) > served
    survivor.ask("sidp_pin_mode", "was")
    assert survivor.ask("generate", pair.loads[0], NEW_TOKENS) == pair.expected[0]


def test_captured_pieces_read_and_write_the_same_addresses_in_every_step(
    pair: Pair, model: Path, tmp_path: Path
) -> None:
    """As piecewise CUDA graphs need it, in both modes; and the tokens are those of plain vLLM.

    Resident layers have vLLM's own linears, between the operators at which a CaS step takes turns.
    """
    with cut_engines(model, tmp_path, resident_layers=RESIDENT) as engines:
        graphs = Pair(engines, [engine.answer() for engine in engines], pair.expected, pair.loads)
        for stats in graphs.stats():  # of the warm-up nothing is counted, copied, sent or learnt
            assert not stats["fetches"]
            assert not stats["steps_broken_off"]
            assert not any(stats["steps"].values())
            assert not any(stats["requests_by_peer"])
            assert not stats["step_times"]
        for mode in ("was", "cas"):
            graphs.pin(mode)
            graphs.check()
            assert all(stats["steps"][mode] == NEW_TOKENS for stats in graphs.stats())
        others = LAYERS - len(RESIDENT)
        for engine, stats in zip(engines, graphs.stats(), strict=True):
            seen, splitting_ops, key = engine.ask(static_graphs.report)
            assert splitting_ops == static_graphs.SPLITTING_OPS
            assert key["sidp_graph"]["computes"]
            assert seen["sidp.vllm_compute"] == 3 * others
            assert seen["sidp.vllm_fetch"] == seen["sidp.vllm_release"] == LAYERS
            assert seen["replayed"] > seen["captured"] > 3 * others
            assert stats["fetches"] == NEW_TOKENS * others // 2
            assert sum(stats["requests_by_peer"]) == NEW_TOKENS * 3 * others // 2
            assert engine.ask(static_graphs.fixed_mode) is None


def test_in_mode_was_resident_layers_are_vllms_own(pair: Pair, model: Path, tmp_path: Path) -> None:
    with cut_engines(model, tmp_path, mode="was", resident_layers=RESIDENT) as engines:
        kept = Pair(engines, [engine.answer() for engine in engines], pair.expected, pair.loads)
        kept.check()
        others = LAYERS - len(RESIDENT)
        for engine, stats in zip(engines, kept.stats(), strict=True):
            seen, _, _ = engine.ask(static_graphs.report)
            assert seen["sidp.vllm_fetch"] == seen["sidp.vllm_release"] == others
            assert not seen["sidp.vllm_compute"]
            assert stats["fetches"] == NEW_TOKENS * others // 2
            assert not any(stats["requests_by_peer"])
            assert engine.ask(static_graphs.fixed_mode) == Mode.WAS


def test_job_of_three_engines_outlives_one(pair: Pair, model: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    source, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"id": t, "prompt": t, "raw": True}) + "\n" for t in TEXTS))
    pids: list[int] = []
    killed: list[int] = []

    def on_event(name: str, *values: Any) -> None:
        if name == "ready":
            pids.extend(values[0])
            os.kill(pids[2], signal.SIGKILL)  # with its first batch in its hands, or about to get it
        elif name == "replica_died":
            killed.append(values[0])

    arguments = {k: v for k, v in COMMON.items() if k not in ("dtype", "seed")}
    report = run(
        JobConfig(
            model=model,
            prompts=source,
            out=out,
            replicas=3,
            batch_size=2,
            max_new_tokens=NEW_TOKENS,
            dtype="float32",
            engine="vllm",
            engine_arguments={**arguments, "kv_cache_memory_bytes": KV_BYTES[1]},
        ),
        on_event,
    )
    assert killed == [2]
    answers = {line["id"]: line["token_ids"] for line in map(json.loads, out.read_text().splitlines())}
    assert sorted(answers) == sorted(TEXTS)
    for text, expected in zip(TEXTS, pair.expected[0], strict=True):
        # rows are independent; the end token ends an answer here, and is an ordinary one in what is expected
        assert answers[text] == expected[: len(answers[text])]
        assert len(answers[text]) == NEW_TOKENS or answers[text][-1] == 2
    assert all(sum(rank.bytes_by_peer) > 0 for rank in report.ranks if rank.rank != 2)
