"""Layers and tensors: byte layout, what is refused, and text that differs whenever anything differs."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidp_runtime import LayerSpec, TensorSpec
from sidp_runtime.errors import ConfigError, UnknownNameError
from sidp_runtime.manifest import (
    ALIGNMENT,
    DTYPE_BYTES,
    align_up,
    contiguous_strides,
    manifest_digest,
    manifest_text,
)

shapes = st.lists(st.integers(1, 9), max_size=4).map(tuple)


@st.composite
def dense_specs(draw: st.DrawFn, name: str = "t") -> TensorSpec:
    """A permutation of a row-major layout."""
    shape = draw(shapes)
    order = draw(st.permutations(range(len(shape))))
    strides, step = [0] * len(shape), 1
    for axis in order:
        strides[axis] = step
        step *= shape[axis]
    return TensorSpec(name, shape, draw(st.sampled_from(sorted(DTYPE_BYTES))), tuple(strides))


@given(st.lists(dense_specs(), min_size=1, max_size=6))
def test_tensors_are_aligned_in_order_and_do_not_overlap(specs: list[TensorSpec]) -> None:
    named = [TensorSpec(f"t{i}", s.shape, s.dtype, s.strides) for i, s in enumerate(specs)]
    layer = LayerSpec("l", tuple(named))
    end = 0
    for spec in named:
        start = layer.offsets[spec.name]
        assert start % ALIGNMENT == 0
        assert end <= start < end + ALIGNMENT
        end = start + spec.num_bytes
    assert layer.num_bytes == align_up(end)


@given(dense_specs())
def test_strides_reach_every_element_once(spec: TensorSpec) -> None:
    last = sum((extent - 1) * stride for extent, stride in zip(spec.shape, spec.strides, strict=True))
    assert last + 1 == math.prod(spec.shape)
    assert spec.num_bytes == (last + 1) * DTYPE_BYTES[spec.dtype]


@given(shapes)
def test_default_strides_are_row_major(shape: tuple[int, ...]) -> None:
    import numpy as np

    expected = tuple(s // 8 for s in np.empty(shape, np.float64).strides)
    assert contiguous_strides(shape) == expected
    assert TensorSpec("t", shape, "float64").strides == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("", (1,), "uint8"), "empty or has white space"),
        (("a b", (1,), "uint8"), "empty or has white space"),
        (("a\n", (1,), "uint8"), "empty or has white space"),
        (("a", (1,), "float3"), "dtype 'float3' is not one of float64, float32"),
        (("a", (3, 0), "uint8"), "extent below 1"),
        (("a", (3, -1), "uint8"), "extent below 1"),
        (("a", (3, 4), "uint8", (8, 1)), "not dense"),
        (("a", (3, 4), "uint8", (1, 1)), "not dense"),
        (("a", (3, 4), "uint8", (0, 1)), "not dense"),
        (("a", (3, 4), "uint8", (-4, 1)), "not dense"),
        (("a", (3, 4), "uint8", (4, 1, 12)), "3 strides for 2 dimensions"),
        (("a", (3,), "uint8", (1, 3)), "2 strides for 1 dimensions"),
    ],
)
def test_what_is_not_a_tensor_is_refused(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TensorSpec(*arguments)


def test_a_stride_of_an_extent_of_one_is_usable_by_torch() -> None:
    """Its value does not matter to the layout, but torch refuses a negative one."""
    with pytest.raises(ConfigError):
        TensorSpec("a", (1, 4), "uint8", (-7, 1))


def test_what_is_not_a_layer_is_refused() -> None:
    tensor = TensorSpec("a", (1,), "uint8")
    with pytest.raises(ConfigError, match="no tensors"):
        LayerSpec("l", ())
    with pytest.raises(ConfigError, match="names tensor 'a' twice"):
        LayerSpec("l", (tensor, tensor))


def test_a_layer_finds_its_tensors() -> None:
    layer = LayerSpec("l", (TensorSpec("a", (1,), "uint8"), TensorSpec("b", (2,), "uint8")))
    assert layer.tensor("b").shape == (2,)
    with pytest.raises(UnknownNameError) as caught:
        layer.tensor("c")
    assert str(caught.value) == "layer 'l' has no tensor 'c'; it has a, b"


def test_the_text_differs_whenever_anything_differs() -> None:
    base = TensorSpec("a", (4, 4), "int16")
    other = TensorSpec("z", (1,), "int8")
    variants = [
        [LayerSpec("l", (base,))],
        [LayerSpec("m", (base,))],
        [LayerSpec("l", (TensorSpec("b", (4, 4), "int16"),))],
        [LayerSpec("l", (TensorSpec("a", (4, 4), "float16"),))],
        [LayerSpec("l", (TensorSpec("a", (2, 8), "int16"),))],
        [LayerSpec("l", (TensorSpec("a", (4, 4), "int16", (1, 4)),))],
        [LayerSpec("l", (base, other))],
        [LayerSpec("l", (other, base))],
        [LayerSpec("l", (base,)), LayerSpec("l", (other,))],
    ]
    assert len({manifest_text(layers) for layers in variants}) == len(variants)
    assert len({manifest_digest(layers) for layers in variants}) == len(variants)
    assert manifest_digest(variants[0]) == manifest_digest([LayerSpec("l", (base,))])
