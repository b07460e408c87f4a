"""Model shapes and GPU profiles: known parameter counts, windows, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.model_configs import RELEASED

from sidp_runtime.errors import CheckpointError, ConfigError, UnsupportedError
from sidp_runtime.planner import GpuProfile, ModelShape, bundled_gpus, bundled_models

BUNDLED = {
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
}
CONFIG = RELEASED["Qwen3-8B"][0]


@pytest.mark.parametrize("name", RELEASED)
def test_parameters_of_released_models(name: str) -> None:
    config, parameters = RELEASED[name]
    assert ModelShape.from_config(config).num_params == parameters


def test_parameters_of_bundled_shapes() -> None:
    assert {name: ModelShape.read(name).num_params for name in bundled_models()} == BUNDLED


def test_a_directory_and_a_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert ModelShape.read(tmp_path).num_params == ModelShape.read(tmp_path / "config.json").num_params == 8_190_735_360


def test_bytes_follow_from_the_shape() -> None:
    shape = ModelShape.read("Qwen/Qwen3-32B")
    assert shape.layer_params == 487_587_840
    assert shape.linear_bytes == 64 * 975_175_680
    assert [layer.num_bytes for layer in shape.layer_specs()] == [975_175_680] * 64
    assert [layer.num_bytes for layer in shape.layer_specs(mlp_only=True)] == [786_432_000] * 64
    assert shape.kv_layer_bytes * shape.num_layers == 262_144  # 2 x 8 heads x 128 x 2 bytes x 64 layers
    assert shape.row_bytes == 2 * ((5120 + 10240) + (8192 + 5120) + (5120 + 5120))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (RELEASED["Mistral-7B-v0.1"][0], [4096] * 32),
        (RELEASED["Mistral-7B-v0.1"][0] | {"sliding_window": None}, [None] * 32),
        (RELEASED["Phi-3-mini"][0], [2047] * 32),
        (RELEASED["Gemma-2-9B"][0], [4096, None] * 21),
        (RELEASED["Gemma-3-1B"][0], ([512] * 5 + [None]) * 4 + [512, 512]),
        (CONFIG | {"sliding_window": 64, "max_window_layers": 30}, [None] * 36),  # use_sliding_window is off
        (CONFIG | {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 30}, [None] * 30 + [64] * 6),
        (
            RELEASED["Gemma-2-9B"][0] | {"layer_types": ["full_attention"] * 41 + ["sliding_attention"]},
            [None] * 41 + [4096],
        ),
    ],
)
def test_windows_by_layer(config: dict[str, Any], expected: list[int | None]) -> None:
    assert list(ModelShape.from_config(config).windows) == expected


def test_a_window_bounds_what_a_token_reads() -> None:
    shape = ModelShape.from_config(RELEASED["Gemma-3-1B"][0])
    assert shape.kv_read_bytes(100) == shape.kv_layer_bytes * 100 * 26
    assert shape.kv_read_bytes(1000) == shape.kv_layer_bytes * (22 * 512 + 4 * 1000)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, UnsupportedError, "'mixtral' is a mixture of experts .*8"),
        ({"model_type": "qwen3_moe"}, UnsupportedError, "'qwen3_moe' is a mixture of experts"),
        ({"model_type": "phimoe", "num_local_experts": 16}, UnsupportedError, "'phimoe' is a mixture of experts"),
        ({"model_type": "deepseek_v3", "n_routed_experts": 256}, UnsupportedError, "n_routed_experts 256"),
        ({"model_type": "gpt2"}, UnsupportedError, "'gpt2' is not one of llama"),
        ({"quantization_config": {"bits": 4}}, UnsupportedError, "quantised"),
        ({"torch_dtype": "float32"}, UnsupportedError, "'float32'.*give one of them"),
        ({"hidden_size": None}, CheckpointError, "hidden_size is None"),
        ({"num_hidden_layers": 0}, CheckpointError, "num_hidden_layers is 0"),
        ({"num_key_value_heads": 5}, CheckpointError, "32 attention heads are no multiple of 5"),
        ({"model_type": "mistral", "sliding_window": 0}, CheckpointError, "sliding_window is 0"),
        (
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["linear"]},
            CheckpointError,
            "layer_types must name",
        ),
        (
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": [["full_attention"]] * 36},
            CheckpointError,
            "layer_types must name",
        ),
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": "2"},
            CheckpointError,
            "max_window_layers is '2'",
        ),
        ({"use_sliding_window": "false"}, CheckpointError, "use_sliding_window is 'false'"),
        ({"attention_bias": "false"}, CheckpointError, "attention_bias is 'false'"),
        ({"tie_word_embeddings": 1}, CheckpointError, "tie_word_embeddings is 1"),
        ({"num_experts": "8"}, CheckpointError, "num_experts is '8'"),
    ],
)
def test_what_cannot_be_planned_is_named(change: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        ModelShape.from_config(CONFIG | change)


def test_null_is_the_default_and_a_pattern_of_zero_is_refused() -> None:
    windowed = CONFIG | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": None}
    assert ModelShape.from_config(windowed).windows == (None,) * 36
    gemma = {key: value for key, value in RELEASED["Gemma-3-1B"][0].items() if key != "layer_types"}
    expected = ([512] * 5 + [None]) * 4 + [512, 512]
    assert list(ModelShape.from_config(gemma | {"sliding_window_pattern": None}).windows) == expected
    with pytest.raises(CheckpointError, match="sliding_window_pattern is 0"):
        ModelShape.from_config(gemma | {"sliding_window_pattern": 0})


def test_the_text_part_of_a_multimodal_gemma_says_what_it_leaves_out() -> None:
    inner = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "intermediate_size": 10240}
    shape = ModelShape.from_config({"model_type": "gemma3", "torch_dtype": "bfloat16", "text_config": inner})
    assert shape.num_params == 3_880_263_168  # gemma-3-4b without its vision tower and projector
    assert "vision" in shape.notes[0]


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_config_is_a_typed_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError):
        ModelShape.read(tmp_path)


def test_an_unknown_name_lists_the_bundled_ones() -> None:
    with pytest.raises(ConfigError, match="bundled shapes: Qwen/Qwen3-32B"):
        ModelShape.read("nobody/nothing")


def test_profiles_say_where_they_come_from() -> None:
    profiles = {name: GpuProfile.read(name.lower()) for name in bundled_gpus()}
    assert {name: p.origin for name, p in profiles.items()} == {
        "H200": "measured",
        "H100": "datasheet",
        "H20": "datasheet",
        "B200": "datasheet",
    }
    for profile in profiles.values():
        assert len(profile.sources) == 2
    # the shares that H200 reached of its datasheet
    assert profiles["B200"].rates.copy_bytes_per_s == pytest.approx(900e9 * 392.7 / 450)
    assert profiles["H20"].rates.flops_per_s == pytest.approx(148e12 * 613.8 / 989.4)


def test_a_profile_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    sheet = {"memory_gbps": 100, "bf16_tflops": 10, "link_gbps": 20, "source": "x"}
    path.write_text(json.dumps({"memory_gib": 2, "memory_source": "y", "datasheet": sheet}))
    profile = GpuProfile.read(path)
    assert (profile.name, profile.memory_bytes, profile.origin) == ("mine", 2 << 30, "datasheet")
    for damaged in ('{"memory_gib": 2}', '{"memory_gib": 0}', "[]", "{"):
        path.write_text(damaged)
        with pytest.raises(ConfigError):
            GpuProfile.read(path)
    with pytest.raises(ConfigError, match="one of H200"):
        GpuProfile.read("H300")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_bytes": 0}, "num_bytes is 0"),
        ({"num_bytes": -1}, "num_bytes is -1"),
        ({"rows": ["1", "2"]}, "rows is '1'"),
        ({"rows": 3}, "TypeError"),
        ({"ms": ["1", "2"]}, "ms is '1'"),
        ({"rows": [2, 1]}, "rows that ascend"),
    ],
)
def test_measured_times_are_read_strictly(change: dict[str, Any], words: str) -> None:
    linears = {"num_bytes": 100, "rows": [1, 2], "ms": [1.0, 2.0]}
    rates = {"copy_gbps": 1, "round_trip_us": 1, "memory_gbps": 1, "tflops": 1, "source": "x"}
    facts = {"memory_gib": 2, "memory_source": "y", "nvlink_domain": 4}
    assert GpuProfile.from_facts("mine", facts | {"measured": rates | {"linears": linears}}).nvlink_domain == 4
    with pytest.raises(ConfigError, match=words):
        GpuProfile.from_facts("mine", facts | {"measured": rates | {"linears": linears | change}})


@pytest.mark.parametrize(
    "facts", [{"memory_gib": 1e308}, {"memory_gib": 1, "measured": 3}, {"memory_gib": 1, "measured": {"linears": 3}}]
)
def test_a_profile_of_nonsense_is_a_typed_error(facts: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="mine"):
        GpuProfile.from_facts("mine", facts)
