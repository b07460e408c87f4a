"""Memory by item: to the byte, as the runtime places, and never less KV for more memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import bench_results
from helpers.model_configs import RELEASED
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sidp_runtime import Placement
from sidp_runtime.errors import ConfigError
from sidp_runtime.placement import choose_resident_layers
from sidp_runtime.planner import (
    DeviceMemory,
    GpuProfile,
    MemorySettings,
    ModelShape,
    bundled_models,
    memory,
    paper_table,
)

SHAPES = [ModelShape.from_config(config, name=name) for name, (config, _) in RELEASED.items()]
SHAPES += [ModelShape.read(name) for name in bundled_models()]
GIB = 1 << 30


@st.composite
def options(draw: st.DrawFn) -> MemorySettings:
    return MemorySettings(
        utilization=draw(st.floats(0.5, 1.0)),
        context_bytes=draw(st.integers(0, GIB)),
        workspace_bytes=draw(st.integers(0, 8 * GIB)),
        block_tokens=draw(st.sampled_from([1, 16, 100])),
        max_rows=draw(st.integers(0, 2048)),
        ring_slots=draw(st.integers(1, 4)),
    )


@st.composite
def devices(draw: st.DrawFn) -> tuple[ModelShape, int, MemorySettings, int, int, int]:
    """(shape, context, settings, world size, resident layers, TP degree; 0: SiDP)."""
    shape = draw(st.sampled_from(SHAPES))
    world, degree = draw(st.sampled_from([2, 3, 4, 8])), draw(st.sampled_from([0, 0, 1, 2, 4]))
    resident = draw(st.integers(0, shape.num_layers))
    return shape, draw(st.integers(1, 40_000)), draw(options()), world, resident, degree


def device(case: tuple[ModelShape, int, MemorySettings, int, int, int], num_bytes: int) -> DeviceMemory:
    shape, context, chosen, world, resident, degree = case
    if degree:
        return memory.plain(shape, num_bytes, context, chosen, degree)
    placement = memory.place(shape, world, resident, chosen)
    return memory.shared(shape, num_bytes, context, chosen, placement)


@settings(max_examples=150, deadline=None)
@given(devices(), st.integers(1 * GIB, 400 * GIB))
def test_the_items_add_up_to_the_device_to_the_byte(
    case: tuple[ModelShape, int, MemorySettings, int, int, int], num_bytes: int
) -> None:
    found = device(case, num_bytes)
    assert sum(found.items.values()) == num_bytes + found.shortfall_bytes
    assert all(size >= 0 for size in found.items.values())
    assert found.fits or (found.kv_tokens, found.sequences) == (0, 0)


@settings(max_examples=150, deadline=None)
@given(devices(), st.integers(1 * GIB, 400 * GIB), st.integers(0, 8 * GIB))
def test_more_memory_never_gives_less_kv(
    case: tuple[ModelShape, int, MemorySettings, int, int, int], num_bytes: int, more: int
) -> None:
    less, greater = device(case, num_bytes), device(case, num_bytes + more)
    assert greater.kv_tokens >= less.kv_tokens
    assert greater.sequences >= less.sequences


@settings(max_examples=100, deadline=None)
@given(devices(), st.integers(1 * GIB, 400 * GIB))
def test_kv_takes_what_it_says_and_one_token_more_does_not_fit(
    case: tuple[ModelShape, int, MemorySettings, int, int, int], num_bytes: int
) -> None:
    found, (shape, context, chosen, _, _, degree) = device(case, num_bytes), case
    assume(found.fits)
    kv = memory.KvCache(shape, context, chosen.block_tokens, degree or 1)
    sequences, rest = divmod(found.kv_tokens, context)
    assert sequences == found.sequences
    assert sequences * kv.sequence_bytes(context) + kv.sequence_bytes(rest) == found.items["KV cache"]
    more = (sequences * kv.sequence_bytes(context)) + kv.sequence_bytes(rest + 1)
    assert more > found.kv_room_bytes == found.items["KV cache"] + found.items["unused"]


@settings(max_examples=60, deadline=None)
@given(devices())
def test_resident_layers_cost_what_they_hold(case: tuple[ModelShape, int, MemorySettings, int, int, int]) -> None:
    shape, context, chosen, world, resident, _ = case
    assume(resident > 0)
    layer = shape.layer_specs()[0].num_bytes

    def held(count: int) -> int:
        return memory.shared(shape, 0, context, chosen, memory.place(shape, world, count, chosen)).shortfall_bytes

    # each costs its bytes less the owner's share; ownership is in whole layers, the heap in whole units, and the
    # last ones may make the ring smaller
    expected = resident * layer * (world - 1) / world
    slack = memory.HEAP_UNIT_BYTES + layer * (1 + chosen.ring_slots)
    assert abs(held(resident) - held(0) - expected) <= slack


@settings(max_examples=40, deadline=None)
@given(devices())
def test_owned_resident_and_ring_bytes_are_the_placements(
    case: tuple[ModelShape, int, MemorySettings, int, int, int],
) -> None:
    shape, context, chosen, world, resident, _ = case
    sizes = [layer.num_bytes for layer in shape.layer_specs()]
    kept = choose_resident_layers(shape.num_layers, resident, world, cas=False)
    assert len(set(kept)) == resident
    placement = Placement.by_layer(sizes, world, ring_slots=chosen.ring_slots, resident_layers=kept)
    items = memory.shared(shape, GIB, context, chosen, memory.place(shape, world, resident, chosen)).items
    assert items["owned layers"] == max(placement.pool_bytes(rank) for rank in range(world))
    assert items["resident layers"] == placement.resident_bytes
    assert items["ring"] == max(placement.ring_bytes(rank) for rank in range(world))
    heap = items["owned layers"] + items["CaS mailbox"] + items["flags and rounding to 512 MiB"]
    assert heap % memory.HEAP_UNIT_BYTES == 0


def test_a_plain_replica_by_hand() -> None:
    shape = ModelShape.read("Qwen/Qwen3-32B")
    found = memory.plain(shape, 100_000_000_000, 4096, MemorySettings())
    room = 90_000_000_000 - (1 << 29) - (7 << 28) - 2 * shape.num_params
    blocks = room // (16 * 262_144)
    assert found.items["KV cache"] == blocks * 16 * 262_144
    assert found.kv_tokens == blocks * 16


@pytest.mark.parametrize(
    ("model", "system", "utilization", "resident", "num_runs"),
    [
        ("Qwen/Qwen3-32B", "dp", 0.57, 0, 5),
        ("Qwen/Qwen3-32B", "dp", 0.90, 0, 8),
        ("Qwen/Qwen3-32B", "sidp", 0.57, 0, 2),
        ("Qwen/Qwen3-32B", "sidp", 0.57, 10, 1),
        ("Qwen/Qwen3-32B", "sidp", 0.57, 20, 2),
        ("Qwen/Qwen3-32B", "sidp", 0.57, 40, 2),
        ("Qwen/Qwen3-32B", "sidp", 0.57, 48, 1),
        ("Qwen/Qwen3-32B", "sidp", 0.90, 0, 2),
        ("Qwen/Qwen3-32B", "sidp", 0.90, 2, 2),
        ("Qwen/Qwen3-32B", "sidp", 0.90, 52, 1),
        ("Qwen/Qwen3-32B", "sidp", 0.90, 62, 1),
        ("Qwen/Qwen3-32B", "sidp_was", 0.57, 62, 1),
        ("Qwen/Qwen3-32B", "sidp_was", 0.90, 0, 1),
        ("Qwen/Qwen3-32B", "sidp_was", 0.90, 62, 1),
        ("Qwen/Qwen2.5-72B", "sidp", 0.90, 0, 1),
        ("meta-llama/Llama-3.1-70B", "sidp", 0.90, 0, 1),
    ],
)
def test_kv_tokens_are_those_that_vllm_reports(
    model: str, system: str, utilization: float, resident: int, num_runs: int
) -> None:
    """vLLM 0.20.2 on two H200; SiDP in mode auto with requests of up to 256 rows, or in mode was."""
    shape, device = ModelShape.read(model), GpuProfile.read("H200").memory_bytes
    chosen = MemorySettings(utilization=utilization, max_rows=0 if system == "sidp_was" else 256)
    if system == "dp":
        planned = memory.plain(shape, device, 4096, chosen)
    else:
        planned = memory.shared(shape, device, 4096, chosen, memory.place(shape, 2, resident, chosen))
    reported = [
        figure["median"]
        for run in bench_results.runs("2x-nvidia-h200")
        for figure in run["figures"]
        if run["shape"] == model.partition("/")[2].lower()
        and (figure["metric"], engines_of(figure)) == ("kv_of_an_engine", system)
        and run["cases"]["e2e_vllm"]["engine"]["gpu_memory_utilization"] == utilization
        and (system == "dp" or num_resident(run, figure) == resident)
    ]
    assert len(reported) == num_runs
    assert reported == pytest.approx([planned.kv_tokens] * num_runs, rel=0.02)


def engines_of(figure: dict[str, Any]) -> str:
    """The mode was asked for by the system's name, or picked by the planner."""
    mode = figure["parameters"].get("mode")
    return f"{figure['subject']}{'' if mode is None else f'_{mode}'}"


def num_resident(run: dict[str, Any], figure: dict[str, Any]) -> int:
    """As the planner picked it (``--plan-for``), or as it was given."""
    given = run["cases"]["e2e_vllm"]["sidp"].get("resident_layers", [])
    return int(figure["parameters"].get("resident", len(given)))


def test_contexts_of_peers_are_those_of_engines_without_cas() -> None:
    shape = ModelShape.read("Qwen/Qwen3-32B")
    for rows, expected in ((0, 3 * (276 << 20)), (64, 0)):
        chosen = MemorySettings(max_rows=rows)
        items = memory.shared(shape, 1 << 37, 4096, chosen, memory.place(shape, 4, 0, chosen)).items
        assert items["peers' CUDA contexts"] == expected


def test_what_fits_exactly_is_used() -> None:
    kv = memory.KvCache(ModelShape.read("Qwen/Qwen3-32B"), 64, 16)
    exact = kv.sequence_bytes(64) + kv.sequence_bytes(32)
    assert kv.fill(exact) == (1, 96, exact)
    assert kv.fill(exact - 1) == (1, 80, exact - kv.sequence_bytes(16))


def test_tensor_parallel_splits_heads_and_repeats_what_it_cannot_split() -> None:
    shape = ModelShape.read("Qwen/Qwen3-32B")
    one, eight, sixteen = (memory.KvCache(shape, 64, 16, degree).layer_token_bytes for degree in (1, 8, 16))
    assert (one, eight, sixteen) == (4096, 512, 512)
    assert memory.plain(shape, 1 << 38, 64, MemorySettings(), 4).items["layers"] == shape.linear_bytes // 4


def test_a_windowed_layer_keeps_its_window_alone() -> None:
    shape = ModelShape.from_config(RELEASED["Gemma-3-1B"][0])
    kv = memory.KvCache(shape, 2048, 16)
    assert kv.sequence_bytes(2048) == kv.layer_token_bytes * (22 * 512 + 4 * 2048)
    assert replace(kv, block_tokens=100).sequence_bytes(1) == kv.layer_token_bytes * 26 * 100


@pytest.mark.parametrize("change", [{"utilization": 0.0}, {"utilization": 1.1}, {"ring_slots": 0}, {"max_rows": -1}])
def test_settings_out_of_range(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        MemorySettings(**change)  # type: ignore[arg-type]


def test_the_gain_of_one_cell_of_the_table_is_pinned() -> None:
    """Qwen3-32B on 8 H200. It is near the 1.8 of arXiv 2605.28095, whose own case is not known."""
    claimed = paper_table.kv_row("Qwen/Qwen3-32B", "H200", 8)
    assert claimed.sidp / claimed.dp == pytest.approx(1.76, abs=0.005)
    assert claimed.mlp_only / claimed.dp == pytest.approx(1.61, abs=0.005)
    rows = paper_table.rows()
    gains = [row.sidp / row.dp for row in rows if row.dp]
    assert max(gains) > 5.8
    assert min(gains) > 1.2
    assert all(row.mlp_only < row.sidp < row.tp_all for row in rows)
    assert {row.model for row in rows if row.dp == 0} == set(paper_table.MODELS[1:])


def test_the_page_has_the_table_as_computed(repository: Path) -> None:
    assert paper_table.markdown() in (repository / "docs" / "model.md").read_text()


def test_a_device_has_a_whole_kv_head_however_many_share_it() -> None:
    shape = ModelShape.read("Qwen/Qwen3-32B")  # 8 KV heads of 128
    eight, sixteen = (memory.plain(shape, 1 << 38, 1, MemorySettings(), degree).items["layers"] for degree in (8, 16))
    projections = 64 * 2 * 128 * 5120 * 2
    assert eight == shape.linear_bytes / 8
    assert sixteen == (shape.linear_bytes - 8 * projections) / 16 + projections
