"""A checkpoint of random weights in a real model's shape, with a tokenizer of bytes and prompts: for ``sidp generate``.

python -m bench.random_model --model Qwen/Qwen3-8B --out /tmp/qwen3-8b

With ``--config-only`` its config.json alone, for ``bench.e2e_vllm --weights dummy``.
"""

from __future__ import annotations

import json
import random
import string
import zlib
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import transformers
import typer
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sidp_runtime.errors import ConfigError
from sidp_runtime.planner.model_shape import bundled_config


def write_config(config: dict[str, Any], folder: Path) -> Any:
    """Writes config.json; returns the model without memory."""
    settings = {key: value for key, value in config.items() if key != "torch_dtype"}
    settings = {"max_position_embeddings": 40960, **settings}
    settings |= {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    hf_config = transformers.CONFIG_MAPPING[settings.pop("model_type")].from_dict(settings)
    hf_config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(hf_config)  # type: ignore[no-untyped-call]
    hf_config.architectures = [type(model).__name__]
    hf_config.save_pretrained(folder)
    return model


def write_model(config: dict[str, Any], folder: Path) -> int:
    """Writes config and weights, a file a layer, each tensor from a seed of its name; returns the weights' bytes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = write_config(config, folder)
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in ((name, value.shape) for name, value in model.named_parameters()):
        parts = name.split(".")
        group = f"layer-{int(parts[2]):03}" if parts[1] == "layers" else "rest"
        groups.setdefault(group, {})[name] = torch.empty(shape, device="meta")
    total = 0
    where = {}
    for group, tensors in groups.items():
        for name, meta in tensors.items():
            generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
            value = torch.empty(meta.shape, dtype=torch.bfloat16, device=device)
            if value.dim() == 1:
                value.fill_(1)  # a norm
            else:
                value.normal_(0, value.shape[1] ** -0.5, generator=generator)
            tensors[name] = value.cpu()
            total += value.nbytes
            where[name] = f"{group}.safetensors"
        save_file(tensors, folder / f"{group}.safetensors", metadata={"format": "pt"})
        tensors.clear()
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def write_tokenizer(folder: Path) -> None:
    """A token a byte; no token ends an answer, so all run to their length."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast: Any = transformers.PreTrainedTokenizerFast  # untyped
    fast(tokenizer_object=tokenizer, pad_token=alphabet[0]).save_pretrained(folder)


def write_prompts(path: Path, count: int, longest: int) -> None:
    """Prompts of letters, of ``longest`` tokens or up to a quarter less."""
    draw = random.Random(0)
    lines = []
    for number in range(count):
        text = "".join(draw.choices(string.ascii_lowercase, k=draw.randint(longest - longest // 4, longest)))
        lines.append(json.dumps({"id": f"p{number}", "prompt": text, "raw": True}))
    path.write_text("\n".join(lines) + "\n")


def main(
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    model: Annotated[str, typer.Option(help="A bundled name of `sidp plan`.")] = "Qwen/Qwen3-8B",
    layers: Annotated[Optional[int], typer.Option(min=1, help="Fewer layers than the model has.")] = None,  # noqa: UP045
    prompts: Annotated[int, typer.Option(min=1, help="Prompts in prompts.jsonl.")] = 32,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 64,
    config_only: Annotated[bool, typer.Option(help="No weights: for engines that make them up.")] = False,
) -> None:
    """Write a model of random bfloat16 weights, its tokenizer and prompts.jsonl."""
    config = bundled_config(model)
    if layers is not None:
        if layers > config["num_hidden_layers"]:
            raise ConfigError(f"{model} has {config['num_hidden_layers']} layers, {layers} were asked for")
        config["num_hidden_layers"] = layers
    out.mkdir(parents=True)
    if config_only:
        write_config(config, out)
        return
    num_bytes = write_model(config, out)
    write_tokenizer(out)
    write_prompts(out / "prompts.jsonl", prompts, prompt_tokens)
    print(f"{out}: {num_bytes / 2**30:.2f} GiB")


if __name__ == "__main__":
    typer.run(main)
