"""What the integrations fetch and release: streamed layers in WaS, local ones in CaS, where a rank takes turns."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sidp_runtime import Mode
from sidp_runtime.integrations import pooled_modules
from sidp_runtime.integrations.vllm import step as vllm_step

LOCAL = [True, False, False, True]


class Runtime:
    """Notes the calls."""

    def __init__(self) -> None:
        self.pool = SimpleNamespace(layers=LOCAL, is_local=lambda layer: LOCAL[layer])
        self.calls: list[tuple[str, int]] = []

    def fetch_layer(self, layer: int) -> None:
        self.calls.append(("fetch", layer))

    def release_layer(self, layer: int) -> None:
        self.calls.append(("release", layer))


def both(*layers: int) -> list[tuple[str, int]]:
    return [(call, layer) for layer in layers for call in ("fetch", "release")]


@pytest.mark.parametrize(("mode", "layers"), [(Mode.WAS, (1, 2)), (Mode.CAS, (0, 3))])
def test_transformers(mode: Mode, layers: tuple[int, ...]) -> None:
    runtime: Any = Runtime()
    state = pooled_modules.StepState(runtime)
    state.mode, x, module = mode, torch.empty(0), torch.nn.Identity()
    for layer in range(len(LOCAL)):
        state.before_layer(layer, module, (x,))
        state.after_layer(layer, module, (x,), x)
    assert runtime.calls == both(*layers)


@pytest.mark.parametrize(("mode", "layers"), [(Mode.WAS, (1, 2)), (Mode.CAS, (0, 3))])
def test_vllm(mode: Mode, layers: tuple[int, ...]) -> None:
    runtime: Any = Runtime()
    state = vllm_step.StepState(runtime, len(LOCAL), max_rows=8)
    state._in_step, state._is_cas = True, mode == Mode.CAS
    for layer in range(len(LOCAL)):
        state.fetch(layer)
        state.release(layer)
    assert runtime.calls == both(*layers)
