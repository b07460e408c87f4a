"""A checkpoint's weights for vLLM: each layer's in its own turn, and what becomes of what a model leaves or misses."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from helpers.stored_model import LAYERS, Model, check_layers, write
from torch import nn

from sidp_runtime.errors import CheckpointError
from sidp_runtime.integrations.vllm.weights import StoredWeights

pytestmark = pytest.mark.unit


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("sidp-read")]


@pytest.mark.parametrize("layers", [[1, 3], [0], list(range(LAYERS)), []])
def test_each_layer_takes_its_own_and_no_other_is_read(tmp_path: Path, layers: list[int]) -> None:
    check_layers(tmp_path, "cpu", layers)
    assert not readers()


def test_what_a_model_leaves_is_not_the_next_layers(tmp_path: Path) -> None:
    write(tmp_path)
    model = Model(skip="model.layers.1.mlp.down_proj.weight")
    weights = StoredWeights(model, str(tmp_path), LAYERS)
    weights.expect([1, 2])
    weights.fill(1, {})
    weights.fill(2, model.of(2))
    weights.close()
    assert set(model.batches[1]) == set(model.of(2))


def test_a_gap_is_named_and_reading_ends(tmp_path: Path) -> None:
    write(tmp_path)
    model = Model()
    weights = StoredWeights(model, str(tmp_path), LAYERS)
    weights.expect([0, 1])
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors of the model: model\.layers\.0\.mlp\.up_proj\.weight"):
        weights.fill(0, {**model.of(0), "model.layers.0.mlp.up_proj.weight": nn.Parameter(torch.zeros(1))})
    weights.close()
    assert not readers()
