"""A transformers model on the GPU pool, and whole jobs: the same tokens unpooled, by WaS and by CaS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.processes import RankContext, run_ranks

from bench.random_model import write_model, write_prompts, write_tokenizer
from sidp_runtime.integrations.transformers import load_pooled_model
from sidp_runtime.job import JobConfig, JobReport, run
from sidp_runtime.loading import Checkpoint

CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "vocab_size": 300,
    "tie_word_embeddings": False,
}
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_model(CONFIG, path)
    write_tokenizer(path)
    write_prompts(path / "prompts.jsonl", 10, 16)
    return path


def job(model: Path, out: Path, replicas: int, mode: str) -> tuple[JobReport, dict[str, list[int]]]:
    report = run(
        JobConfig(
            model, model / "prompts.jsonl", out, replicas, backend="nvshmem", mode=mode, max_new_tokens=NEW_TOKENS
        )
    )
    return report, {line["id"]: line["token_ids"] for line in map(json.loads, out.read_text().splitlines())}


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """What one replica answers, which holds all of the weights."""
    report, answers = job(model, tmp_path_factory.mktemp("alone") / "out.jsonl", 1, "was")
    assert report.ranks[0].bytes_by_peer == [0]
    assert len(answers) == 10
    assert len({tuple(tokens) for tokens in answers.values()}) > 5, "the model says the same to all"
    return answers


@pytest.mark.parametrize("mode", ["was", "cas"])
def test_a_job_answers_as_one_replica_does(mode: str, model: Path, alone: dict[str, list[int]], tmp_path: Path) -> None:
    report, answers = job(model, tmp_path / "out.jsonl", 2, mode)
    assert answers == alone
    steps = [rank.steps[mode] for rank in report.ranks]
    assert sum(steps) == 3 * NEW_TOKENS  # batches of 4, 4 and 2 prompts
    moved = sum(sum(rank.bytes_by_peer) for rank in report.ranks)
    asked = sum(sum(rank.requests_by_peer) for rank in report.ranks)
    assert moved > 0 if mode == "was" else asked > 0
    assert all(rank.fallbacks == 0 for rank in report.ranks)
    assert all(rank.kv_bytes_gained is not None for rank in report.ranks)


def generate(context: RankContext, model: str, mode: str) -> list[list[int]]:
    with context.group(backend="nvshmem", deadline_ms=60_000) as group:
        pooled = load_pooled_model(Checkpoint.open(model), group, dtype="bfloat16", mode=mode, row_buckets=[2, 2 * 7])
        ids = torch.arange(14, device=context.device("nvshmem")).view(2, 7)
        reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(ids.device)
        settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            mask = torch.ones_like(ids)
            expected = reference.generate(input_ids=ids, attention_mask=mask, **settings)
            got = pooled.model.generate(input_ids=ids, attention_mask=mask, **settings)
        pooled.runtime.check()
        assert torch.equal(got, expected)
        assert pooled.stats()["steps"][mode] == NEW_TOKENS
        context.meet("end")
        pooled.close()
    return [[int(token) for token in row] for row in got]


@pytest.mark.parametrize("mode", ["was", "cas"])
def test_generate_gives_the_tokens_of_transformers(mode: str, model: Path) -> None:
    first, second = run_ranks(generate, 2, timeout_s=90, model=str(model), mode=mode)
    assert first == second
