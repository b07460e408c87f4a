"""A stand-in for a vLLM model that takes a checkpoint's weights, and a checkpoint for it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from sidp_runtime.integrations.vllm.weights import StoredWeights

LAYERS = 4


class Model:
    """Loads as vLLM's models do: by name, and it says what it loaded. ``skip``: names that it stops at."""

    def __init__(self, device: str = "cpu", skip: str = "") -> None:
        names = [f"model.layers.{i}.mlp.{linear}_proj.weight" for i in range(LAYERS) for linear in ("gate", "down")]
        self.values = {name: nn.Parameter(torch.zeros(32, 16, device=device)) for name in [*names, "norm.weight"]}
        self.batches: list[list[str]] = []
        self._skip = skip

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        self.batches.append([])
        for name, value in (pair for pair in weights):  # as a mapper wraps it, and closes it with itself
            if name == self._skip:
                break
            self.values[name].data.copy_(value)
            self.batches[-1].append(name)
        return set(self.batches[-1])

    def of(self, layer: int | None) -> dict[str, nn.Parameter]:
        where = "norm" if layer is None else f"layers.{layer}."
        return {name: value for name, value in self.values.items() if where in name}


def write(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint of it, of random numbers."""
    stored = {name: torch.randn(32, 16) for name in Model().values}
    save_file(stored, folder / "model.safetensors")
    return stored


def check_layers(folder: Path, device: str, layers: list[int]) -> None:
    """``layers`` and the rest are filled with what was stored, each in its own call, and nothing else is read."""
    stored, model = write(folder), Model(device)
    weights = StoredWeights(model, str(folder), LAYERS, page_locked=device != "cpu")
    weights.expect(layers)
    filled = [*layers, None]
    for layer in filled:
        weights.fill(layer, model.of(layer))
    weights.close()
    assert [set(batch) for batch in model.batches] == [set(model.of(layer)) for layer in filled]
    for name, value in model.values.items():
        held = any(name in model.of(layer) for layer in filled)
        assert torch.equal(value.cpu(), stored[name] if held else torch.zeros(32, 16)), name
    tensors = 2 * len(layers) + 1
    report, total = weights.report()
    assert (report.bytes_read, report.num_tensors) == (tensors * 32 * 16 * 4, tensors)
    assert total == len(stored) * 32 * 16 * 4
