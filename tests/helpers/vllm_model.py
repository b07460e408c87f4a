"""SmolLM2-135M-Instruct as a directory that vLLM reads: the package's GGUF, dequantised, with config and tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from helpers.gguf_model import real_model
from sidp_runtime._torch import dtype_of
from sidp_runtime.loading import Checkpoint, CheckpointSource, tokenizer_dir
from sidp_runtime.manifest import TensorSpec


def save_real_model(folder: Path, dtype: str) -> Path:
    """Writes the directory and returns it; ``dtype`` is that of the stored weights."""
    checkpoint = Checkpoint.open(real_model())
    tensors = {}
    with CheckpointSource(checkpoint) as source:
        for name, entry in checkpoint.entries.items():
            tensor = torch.empty(entry.shape, dtype=dtype_of(dtype))
            spec = TensorSpec(name, entry.shape, dtype)
            source.read_into(name, tensor.view(torch.uint8).view(-1).numpy().data, spec)
            tensors[name] = tensor
    shutil.copytree(tokenizer_dir(checkpoint), folder, dirs_exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**checkpoint.config, "architectures": ["LlamaForCausalLM"], "dtype": dtype}
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder
