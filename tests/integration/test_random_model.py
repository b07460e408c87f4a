"""The checkpoint of random weights that stands in for a model that is too large to carry."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from bench.random_model import main
from sidp_runtime.errors import ConfigError
from sidp_runtime.job.prompts import read_prompts
from sidp_runtime.planner import model_shape


def test_it_is_a_model_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {**model_shape.bundled_config("Qwen/Qwen3-8B"), "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    tiny |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 260}
    monkeypatch.setattr(model_shape, "_bundled", lambda: {"tiny": tiny})
    main(tmp_path / "model", "tiny", layers=3, prompts=5, prompt_tokens=8)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    weights = [layer.mlp.up_proj.weight for layer in loaded.model.layers]
    assert len(weights) == 3
    assert not torch.equal(weights[0], weights[1]), "a layer in the place of another would not be noticed"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.decode(tokenizer("abz ü")["input_ids"]) == "abz ü"
    assert len(tokenizer("abz")["input_ids"]) == 3
    assert {len(prompt.text or "") for prompt in read_prompts(tmp_path / "model" / "prompts.jsonl")} <= set(range(6, 9))


def test_more_layers_than_the_model_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="36 layers, 37"):
        main(tmp_path / "model", "Qwen/Qwen3-8B", layers=37)
    assert not (tmp_path / "model").exists()


def test_a_config_alone_is_enough_for_engines_that_make_up_the_weights(tmp_path: Path) -> None:
    main(tmp_path / "model", "Qwen/Qwen3-32B", config_only=True)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    assert config.architectures == ["Qwen3ForCausalLM"]
    assert (config.num_hidden_layers, config.hidden_size, config.max_position_embeddings) == (64, 5120, 40960)
