"""Every supported family, each mode, 2 and 3 replicas: pooled and unpooled models give the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hf import VOCABULARY, load_unpooled, pooled_model, save_tiny_model
from helpers.processes import RankContext, run_ranks

from sidp_runtime.errors import CheckpointError, ConfigError, SidpError, UnsupportedError
from sidp_runtime.integrations.transformers import load_pooled_model
from sidp_runtime.loading import Checkpoint

FAMILIES = ("llama", "llama-bias", "qwen2", "qwen3")
CHOICES: tuple[dict[str, Any], ...] = ({}, {"pool_embedding": True, "pool_head": True}, {"resident_layers": (1, 4)})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        save_tiny_model(folder / family, family)
    return folder


def tokens_of(rank: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(rank))


def generate(model: Any, ids: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # one prompt is shorter
    with torch.inference_mode():
        result = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert isinstance(result, torch.Tensor)
    return result


def all_choices(context: RankContext, folder: str, family: str) -> list[dict[str, Any]]:
    path = Path(folder) / family
    reference, ids = load_unpooled(path), tokens_of(context.rank)
    expected = generate(reference, ids)
    with torch.inference_mode():
        logits = reference(ids).logits
    seen = []
    for number, choice in enumerate(CHOICES):
        for mode in ("was", "cas", "auto"):
            name = f"{mode}-{number}"
            with pooled_model(context, Checkpoint.open(path), name, mode=mode, max_rows=32, **choice) as pooled:
                assert torch.equal(generate(pooled.model, ids), expected), name
                with torch.inference_mode():
                    assert torch.equal(pooled.model(ids).logits, logits), name
                seen.append({"mode": mode, **pooled.stats()})
    return seen


@pytest.mark.parametrize(("world_size", "family"), [*((2, family) for family in FAMILIES), (3, "llama"), (3, "qwen3")])
def test_same_bits_in_every_mode(models: Path, family: str, world_size: int) -> None:
    for seen in run_ranks(all_choices, world_size, folder=str(models), family=family, timeout_s=120):
        for stats in seen:
            steps = stats["steps"]
            # Equal outputs prove nothing if the pool was not used.
            if stats["mode"] == "was":
                assert steps["cas"] == 0
                assert stats["fetches"] > 0
                assert sum(stats["bytes_by_peer"]) > 0
                assert sum(stats["requests_by_peer"]) == 0
            elif stats["mode"] == "cas":
                assert steps["was"] == stats["fetches"] == 0
                assert sum(stats["requests_by_peer"]) > 0
            assert steps["was"] + steps["cas"] == 7
            assert stats["fallbacks"] == stats["steps_broken_off"] == 0


def layers_fetched(context: RankContext, folder: str) -> list[dict[str, list[int]]]:
    seen = []
    for mode in ("was", "cas"):
        with pooled_model(context, Checkpoint.open(Path(folder) / "llama"), mode, mode=mode, max_rows=32) as pooled:
            fetched: list[int] = []
            runtime: Any = pooled.runtime
            fetch_layer = runtime.fetch_layer
            runtime.fetch_layer = lambda layer, f=fetch_layer, to=fetched: (to.append(layer), f(layer))
            with torch.inference_mode():
                pooled.model(tokens_of(0))
            local = [runtime.pool.is_local(layer) for layer in range(len(runtime.pool.layers))]
            seen.append({"fetched": fetched, "expected": [i for i, own in enumerate(local) if own == (mode == "cas")]})
    return seen


def test_streamed_layers_are_fetched_in_was_and_local_ones_in_cas(models: Path) -> None:
    for modes in run_ranks(layers_fetched, 2, folder=str(models)):
        for seen in modes:
            assert seen["fetched"] == seen["expected"] != []


def compiled(context: RankContext, folder: str) -> list[float]:
    path = Path(folder) / "llama"
    ids = tokens_of(context.rank)
    with torch.inference_mode():
        expected = load_unpooled(path)(ids).logits
    errors = []
    for mode in ("was", "cas"):
        with pooled_model(context, Checkpoint.open(path), mode, mode=mode, max_rows=32) as pooled:
            inner = pooled.model.model
            inner.forward = torch.compile(inner.forward, backend="aot_eager")
            with torch.inference_mode():
                for _ in range(3):
                    errors.append(float((pooled.model(ids).logits - expected).abs().max()))
            stats = pooled.stats()
            assert stats["steps"][mode] == 3
            assert stats["fetches"] + sum(stats["requests_by_peer"]) > 0
    return errors


def test_torch_compile_keeps_the_order(models: Path) -> None:
    for errors in run_ranks(compiled, 2, folder=str(models), timeout_s=180):
        assert errors == [0.0] * len(errors)


def one_alone(context: RankContext, folder: str) -> dict[str, Any]:
    path = Path(folder) / "qwen3"
    ids = tokens_of(0)
    with pooled_model(context, Checkpoint.open(path), "alone") as pooled:
        assert torch.equal(generate(pooled.model, ids), generate(load_unpooled(path), ids))
        return pooled.stats()


def test_group_of_one_keeps_everything(models: Path) -> None:
    (stats,) = run_ranks(one_alone, 1, folder=str(models))
    assert stats["copies"] == 0
    assert stats["decisions"]["all-local"] == 6


def refused(context: RankContext, folder: str, config: dict[str, Any], mode: str) -> list[str]:
    checkpoint = Checkpoint.open(Path(folder) / "llama")
    checkpoint.config.update(config)
    try:
        load_pooled_model(checkpoint, context.group(), mode=mode)
    except SidpError as error:
        return [type(error).__name__, str(error)]
    raise AssertionError("it was not refused")


@pytest.mark.parametrize(
    ("config", "mode", "kind", "words"),
    [
        ({"model_type": "mixtral"}, "auto", UnsupportedError, "'mixtral'"),
        ({"quantization_config": {"bits": 4}}, "auto", UnsupportedError, "quantised"),
        ({}, "fast", ConfigError, "'fast'"),
        ({"num_hidden_layers": 6}, "auto", CheckpointError, "model.layers.5"),
        ({"intermediate_size": 97}, "auto", SidpError, "97"),
    ],
)
def test_refused_before_anything_is_made(
    models: Path, config: dict[str, Any], mode: str, kind: type[SidpError], words: str
) -> None:
    (seen,) = run_ranks(refused, 1, folder=str(models), config=config, mode=mode)
    assert words in seen[1]
    assert kind is SidpError or seen[0] == kind.__name__
