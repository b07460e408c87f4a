"""Capture of ops: what becomes a program for C++, and what is refused by a typed error instead of guessed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch.nn import functional

from sidp_runtime import LayerSpec, Op, TensorSpec, _torch, _torch_gpu
from sidp_runtime.errors import ConfigError, UnknownNameError, UnsupportedError
from sidp_runtime.ops import OpProgram, buckets_of, spread_rows

HIDDEN = 6
LAYER = LayerSpec(
    "l",
    (
        TensorSpec("w", (4, HIDDEN), "float32"),
        TensorSpec("column_major", (4, HIDDEN), "float32", (1, 4)),
        TensorSpec("bias", (4,), "float32"),
        TensorSpec("norm", (HIDDEN,), "float32"),
        TensorSpec("table", (10, 5), "bfloat16"),
    ),
)
NAMES = {spec.name: spec.name for spec in LAYER.tensors}
Weights = Mapping[str, torch.Tensor]


def capture(function: Callable[[Weights, torch.Tensor], Any], dtype: str = "float32", width: int = HIDDEN) -> OpProgram:
    op = Op("op", function, width, dtype, {0: NAMES})
    return _torch.capture(op, op.specs([LAYER], 0))


ACCEPTED: dict[str, tuple[Callable[[Weights, torch.Tensor], Any], list[str], tuple[int, ...]]] = {
    "linear": (lambda w, x: functional.linear(x, w["w"]), ["aten::linear"], (4,)),
    "bias": (lambda w, x: functional.linear(x, w["w"], w["bias"]), ["aten::linear"], (4,)),
    "strided": (lambda w, x: functional.linear(x, w["column_major"]), ["aten::linear"], (4,)),
    "silu": (lambda w, x: functional.silu(x), ["aten::silu"], (HIDDEN,)),
    "relu": (lambda w, x: torch.relu(x), ["aten::relu"], (HIDDEN,)),
    "mul": (lambda w, x: x * w["norm"], ["aten::mul"], (HIDDEN,)),
    "tuple": (
        lambda w, x: (functional.linear(x, w["w"]), torch.tanh(x)),
        ["aten::linear", "aten::tanh"],
        (4, HIDDEN),
    ),
    "list": (lambda w, x: [torch.sigmoid(x)], ["aten::sigmoid"], (HIDDEN,)),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    function, calls, columns = ACCEPTED[name]
    program = capture(function)
    assert [call[0] for call in program.calls] == calls
    assert program.output_columns == columns
    assert program.output_dtypes == ("float32",) * len(columns)
    assert program.out_row_bytes == 4 * sum(columns)
    assert program.weight_names == tuple(NAMES)
    assert program.outputs == tuple(range(1, len(calls) + 1))


def test_an_embedding_takes_integer_rows_and_gives_its_tables_dtype() -> None:
    program = capture(lambda w, x: functional.embedding(x[:, 0], w["table"]), "int64", 1)
    assert program.calls[-1][0] == "aten::embedding"
    assert program.output_columns == (5,)
    assert program.output_dtypes == ("bfloat16",)


def test_arguments_name_weights_registers_and_defaults() -> None:
    program = capture(lambda w, x: functional.linear(functional.linear(x, w["w"], w["bias"]), w["w"].t()))
    first, last = program.calls[0], program.calls[-1]
    assert first == (
        "aten::linear",
        "",
        (("register", 0, False), ("weight", 0, False), ("weight", 2, True)),
    )
    assert last[2][0] == ("register", 1, False)
    assert last[2][2] == ("none", 0, False)


def test_capture_does_not_touch_data_and_asks_for_no_gradient() -> None:
    program = capture(lambda w, x: functional.linear(x, w["w"].requires_grad_(False)))
    assert program.output_columns == (4,)


CLOSURE = torch.ones(HIDDEN)
SCALAR = torch.tensor(2.0)

REFUSED: dict[str, tuple[Callable[[Weights, torch.Tensor], Any], str]] = {
    "row count": (lambda w, x: x + float(x.shape[0]), "depends on the number of rows"),
    "row count in a shape": (
        lambda w, x: functional.silu(x).view(x.shape[0] * HIDDEN // HIDDEN, HIDDEN),
        "depends on the number of rows",
    ),
    "closure": (lambda w, x: x * CLOSURE, "op 'op'"),
    "scalar closure": (lambda w, x: x * SCALAR, "op 'op'"),
    "number argument": (lambda w, x: x + w["norm"], "alpha=1 of type number"),  # torch's C interface has no Scalar
    "string argument": (lambda w, x: functional.gelu(x, approximate="tanh"), "cannot run without Python"),
    "list argument": (lambda w, x: functional.layer_norm(x, (HIDDEN,)), "cannot run without Python"),
    "in place": (lambda w, x: functional.silu(x).add_(w["norm"]), "does not give one new tensor"),
    "in place on x": (lambda w, x: x.add_(w["norm"]), "does not give one new tensor"),
    "several results": (lambda w, x: functional.silu(x).max(dim=1).values[:, None], "does not give one new tensor"),
    "x itself": (lambda w, x: x, "must return new tensors"),
    "a weight": (lambda w, x: w["w"], "must return new tensors"),
    "not rows": (lambda w, x: functional.silu(x)[:, 0], "op 'op'"),
    "a number": (lambda w, x: 3, "op 'op'"),
    "nothing": (lambda w, x: None, "op 'op'"),
    "a branch on data": (lambda w, x: x * w["norm"] if bool(x.sum() > 0) else x + w["norm"], "op 'op'"),
    "shapes that do not fit": (lambda w, x: functional.linear(x, w["bias"][None]), "op 'op'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    function, words = REFUSED[name]
    with pytest.raises(UnsupportedError, match=words) as caught:
        capture(function)
    assert str(caught.value).startswith("op 'op'"), "the message does not name the op"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "float3"}, "dtype 'float3'"),
        ({"in_features": 0}, "in_features is 0"),
        ({"weights": {}}, "belongs to no layer"),
    ],
)
def test_bad_declarations(changes: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"in_features": 1, "dtype": "float32", "weights": {0: NAMES}} | changes
    with pytest.raises(ConfigError, match=words):
        Op("op", lambda w, x: x, **arguments)


def test_names_that_do_not_exist() -> None:
    op = Op("op", lambda w, x: x, 1, "float32", {-1: NAMES, 0: {"a": "nothing"}, 1: NAMES})
    with pytest.raises(UnknownNameError, match="has no tensor 'nothing'"):
        op.specs([LAYER], 0)
    for layer in (-1, 1):
        with pytest.raises(UnknownNameError, match=f"layer {layer}; the pool has 1"):
            op.specs([LAYER], layer)


def test_owners_compute_finer_row_counts_where_products_take_longer_for_more_rows() -> None:
    assert spread_rows(1) == [1]
    assert spread_rows(100) == [1, 2, 4, 8, 16, 32, 64, 100]
    assert spread_rows(256) == [1, 2, 4, 8, 16, 32, 64, 128, 160, 192, 224, 256]
    assert spread_rows(600)[-6:] == [256, 320, 384, 448, 512, 600]
    assert buckets_of(200, None) == spread_rows(200)
    assert buckets_of(0, [3, 8]) == [3, 8]


def test_handles_of_runtimes_are_never_given_twice() -> None:
    """A compiled graph keeps its handle; it must not find a later runtime by it."""

    class Fake:
        pass

    first = Fake()
    handle = _torch.register_runtime(first)  # type: ignore[arg-type]
    del first
    second = Fake()
    assert _torch.register_runtime(second) != handle  # type: ignore[arg-type]


def declared(function: Callable[[Weights, torch.Tensor], Any], *outputs: tuple[int, str]) -> Op:
    return Op("op", function, HIDDEN, "float32", {0: NAMES}, outputs, "words")


def kernel_of_a_gpu(w: Weights, x: torch.Tensor) -> torch.Tensor:
    raise AssertionError("it was called without data")


def test_an_op_that_says_what_it_gives_is_not_looked_into_on_a_gpu() -> None:
    op = declared(kernel_of_a_gpu, (4, "bfloat16"), (2, "float32"))
    program = _torch.program_of(op, op.specs([LAYER], 0), 0)
    assert (program.output_columns, program.output_dtypes) == ((4, 2), ("bfloat16", "float32"))
    assert program.out_row_bytes == 4 * 2 + 2 * 4
    assert program.weight_names == tuple(NAMES)
    with pytest.raises(UnsupportedError, match="cannot be captured"):
        _torch.program_of(op, op.specs([LAYER], 0), None)
    silent = declared(kernel_of_a_gpu)
    with pytest.raises(UnsupportedError, match="cannot be captured"):
        _torch.program_of(silent, silent.specs([LAYER], 0), 0)


@pytest.mark.parametrize("outputs", [((5, "float32"),), ((4, "bfloat16"),), ((4, "float32"), (4, "float32"))])
def test_an_op_that_says_something_else_than_it_gives(outputs: tuple[tuple[int, str], ...]) -> None:
    def linear(w: Weights, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, w["w"])

    right = declared(linear, (4, "float32"))
    assert _torch.program_of(right, right.specs([LAYER], 0), None).calls
    wrong = declared(linear, *outputs)
    with pytest.raises(ConfigError, match=r"op 'op' says that it gives .*, and gives \(\(4, 'float32'\),\)"):
        _torch.program_of(wrong, wrong.specs([LAYER], 0), None)


@pytest.mark.parametrize("outputs", [((5, "float32"),), ((4, "bfloat16"),), ((4, "float32"), (4, "float32"))])
def test_what_an_op_gives_on_a_gpu_is_held_to_what_it_says(outputs: tuple[tuple[int, str], ...]) -> None:
    """Its answers would else be put beyond their slot."""
    _torch_gpu.check_outputs(declared(kernel_of_a_gpu, (4, "float32")), 3, torch.zeros(3, 4))
    _torch_gpu.check_outputs(declared(kernel_of_a_gpu), 3, torch.zeros(3, 4))  # it was traced
    with pytest.raises(ConfigError, match="op 'op' says that it gives"):
        _torch_gpu.check_outputs(declared(kernel_of_a_gpu, *outputs), 3, torch.zeros(3, 4))
    with pytest.raises(ConfigError, match="op 'op' says that it gives"):
        _torch_gpu.check_outputs(declared(kernel_of_a_gpu, (4, "float32")), 2, (torch.zeros(3, 4),))
