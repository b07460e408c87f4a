"""fp8 in the real vLLM on a CPU: a small checkpoint, and a kernel where vLLM's own need a GPU or AMX.

Configuration, linear method and loading are vLLM's own; the kernel rewrites weights as those of GPUs do: transposed,
with other scales under another name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

LAYERS = 5  # of two ranks one owns three
HIDDEN, INTERMEDIATE, HEAD, HEADS, KV_HEADS, VOCABULARY = 256, 384, 128, 2, 1, 512
BLOCK = 128
#: Rows and columns as they are stored.
LINEARS = {
    "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
#: For ``LLM``: fp8 takes no other on a CPU.
DTYPE = "bfloat16"


def save_fp8_model(folder: Path) -> Path:
    """A small Qwen3 of random weights, in blocks of 128 x 128 as Qwen3-32B-FP8 is."""
    dice = torch.Generator().manual_seed(1)
    ones = {f"model.layers.{i}.{n}.weight": HIDDEN for i in range(LAYERS) for n in _NORMS}
    ones |= {f"model.layers.{i}.self_attn.{n}_norm.weight": HEAD for i in range(LAYERS) for n in "qk"}
    tensors = {name: torch.ones(size, dtype=torch.bfloat16) for name, size in ones.items()}
    tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = torch.randn(VOCABULARY, HIDDEN, generator=dice).to(torch.bfloat16)
    for layer in range(LAYERS):
        for linear, (rows, columns) in LINEARS.items():
            # each block with a size of its own, so that a scale in the wrong place shows
            sizes = torch.rand(rows // BLOCK, 1, columns // BLOCK, 1, generator=dice) + 0.5
            blocks = torch.randn(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK, generator=dice) * sizes * columns**-0.5
            scale = blocks.abs().amax((1, 3), keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
            prefix = f"model.layers.{layer}.{linear}"
            tensors[f"{prefix}.weight"] = (blocks / scale).to(torch.float8_e4m3fn).view(rows, columns)
            tensors[f"{prefix}.weight_scale_inv"] = scale[:, 0, :, 0].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    return folder


_NORMS = ("input_layernorm", "post_attention_layernorm")
_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "vocab_size": VOCABULARY,
    "attention_bias": False,
    "dtype": DTYPE,
    "quantization_config": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [BLOCK, BLOCK],
    },
}


def register() -> None:
    """Lets vLLM choose the kernel for fp8 in blocks on a CPU. In each engine's process, before the engine."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
    from vllm.model_executor.utils import replace_parameter
    from vllm.platforms import PlatformEnum

    class TransposedKernel(Fp8BlockScaledMMLinearKernel):
        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

        def process_weights_after_loading(self, layer: Any) -> None:
            blocks = layer.weight_scale_inv.data
            wide = layer.weight.float() * blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            scale = wide.abs().amax(1) / torch.finfo(torch.float8_e4m3fn).max
            narrow = (wide / scale[:, None]).to(torch.float8_e4m3fn)
            replace_parameter(layer, "weight", narrow.t())
            layer.register_parameter("weight_scale", torch.nn.Parameter(scale, requires_grad=False))
            del layer.weight_scale_inv

        def apply_weights(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            # in calls that take tensors alone, which an owner on the host can run
            assert layer.input_scale is None
            wide = layer.weight.type_as(layer.weight_scale) * layer.weight_scale
            return torch.nn.functional.linear(x, wide.type_as(x).t(), bias)

        def apply_block_scaled_mm(self, A: Any, B: Any, As: Any, Bs: Any) -> Any:
            raise NotImplementedError

    # vLLM has register_linear_kernel for other kinds alone
    linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU] = [TransposedKernel]


def weights_of(worker: Any) -> list[tuple[str, int, tuple[int, ...], str]]:
    """For ``collective_rpc``: dtype, address, strides and kernel of each decoder layer's ``down_proj``."""
    found = []
    for block in worker.model_runner.model.model.layers:
        linear = getattr(block.mlp, "inner", block.mlp).down_proj
        kernel = type(linear.quant_method.fp8_linear).__name__
        found.append((str(linear.weight.dtype), linear.weight.data_ptr(), tuple(linear.weight.stride()), kernel))
    return found
