"""The only module of the core that imports torch: views, stores, capture of ops, operators for torch.compile."""

from __future__ import annotations

import datetime
import itertools
import socket
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.dlpack import from_dlpack

from . import _C
from .errors import ConfigError, PeerDeadError, ShapeError, UnsupportedError
from .manifest import DTYPE_BYTES, LayerSpec, TensorSpec
from .ops import Op, OpProgram

if TYPE_CHECKING:
    from .group import Store
    from .runtime import Runtime

# torch's ScalarType numbers (c10/core/ScalarType.h); part of its stable interface.
_SCALAR_TYPES = {
    "uint8": 0,
    "int8": 1,
    "int16": 2,
    "int32": 3,
    "int64": 4,
    "float16": 5,
    "float32": 6,
    "float64": 7,
    "bool": 11,
    "bfloat16": 15,
    "float8_e5m2": 23,
    "float8_e4m3fn": 24,
}


def versions() -> str:
    """Versions that all ranks must share, in one line."""
    from . import __version__

    return f"sidp_runtime {__version__} torch {torch.__version__}"


def on_stream(handle: int, device: int | None) -> AbstractContextManager[Any]:
    """Makes a CUDA stream torch's current one; nothing to do on the host (``device`` None)."""
    if device is None or current_stream(device) == handle:
        return nullcontext()
    stream = torch.cuda.ExternalStream(handle, device)  # type: ignore[no-untyped-call]
    return torch.cuda.stream(stream)


def current_stream(device: int) -> int:
    """The CUstream of torch's current stream: as torch's compiler asks for it, in a twentieth of a Stream's time."""
    return int(torch._C._cuda_getCurrentRawStream(device))


def dtype_of(name: str) -> torch.dtype:
    """torch's dtype of a manifest's name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def name_of(dtype: torch.dtype) -> str:
    """The manifest's name of torch's dtype."""
    return str(dtype).removeprefix("torch.")


def tensor_views(view: _C.ByteView, layer: LayerSpec) -> dict[str, torch.Tensor]:
    """Tensors of a layer inside its bytes, by name. They keep the memory alive."""
    flat = from_dlpack(view)
    views = {}
    for spec in layer.tensors:
        start = layer.offsets[spec.name]
        elements = flat[start : start + spec.num_bytes].view(dtype_of(spec.dtype))
        views[spec.name] = elements.as_strided(spec.shape, spec.strides)
    return views


def writable_bytes(view: _C.ByteView) -> memoryview:
    """The bytes themselves, as a writable buffer that keeps the memory alive."""
    return from_dlpack(view).numpy().data


def copy_bytes(view: _C.ByteView, source: memoryview) -> None:
    """Writes host bytes to the start of a view on any device."""
    target = from_dlpack(view)
    target[: source.nbytes].copy_(torch.frombuffer(source, dtype=torch.uint8))


# --- Stores ---------------------------------------------------------------------------------------------------------


def make_store_server() -> tuple[Store, str, int]:
    """A store in this process for this machine's processes, its host and its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    host, port = listener.getsockname()
    return _tcp_store(host, port, is_master=True, master_listen_fd=listener.detach()), host, port


def connect_store(host: str, port: int, deadline_ms: int, *, is_master: bool = False) -> Store:
    """The group's store. ``PeerDeadError`` if nobody serves it within the deadline.

    A master of this machine's processes listens on the loopback device only: torch's default is every device, as IPv6,
    where its one thread asks the name server who each client is, and a lost answer keeps all of them waiting for
    seconds (pytorch issue 159007).
    """
    options: dict[str, Any] = {"is_master": is_master, "timeout": datetime.timedelta(milliseconds=deadline_ms)}
    try:
        if is_master and host in ("127.0.0.1", "localhost"):
            options["master_listen_fd"] = socket.create_server((host, port)).detach()
        return _tcp_store(host, port, **options)
    except (RuntimeError, OSError) as error:
        raise PeerDeadError(
            f"no store at {host}:{port} within {deadline_ms} ms: {error}; is the process that holds it running?",
            waited_ms=deadline_ms,
        ) from error


def _tcp_store(host: str, port: int, **options: Any) -> Store:
    store: Any = dist.TCPStore(host, port, wait_for_workers=False, **options)  # type: ignore[attr-defined]
    result: Store = store
    return result


# --- Ops ------------------------------------------------------------------------------------------------------------


def program_of(op: Op, specs: Mapping[str, TensorSpec], device: int | None) -> OpProgram:
    """What the op is: traced, or on a GPU as it says itself. ``ConfigError`` if it says something else than is seen."""
    if device is not None and op.outputs:
        columns, dtypes = zip(*op.outputs, strict=True)
        return OpProgram(tuple(specs), (), (), columns, dtypes)
    program = capture(op, specs)
    seen = tuple(zip(program.output_columns, program.output_dtypes, strict=True))
    if op.outputs not in ((), seen):
        raise ConfigError(f"op {op.name!r} says that it gives {op.outputs} (columns, dtype), and gives {seen}")
    return program


def capture(op: Op, specs: Mapping[str, TensorSpec]) -> OpProgram:
    """Traces an op's function on tensors without data. ``UnsupportedError`` for what cannot run without Python."""
    weights = {
        short: torch.empty_strided(spec.shape, spec.strides, dtype=dtype_of(spec.dtype), device="meta")
        for short, spec in specs.items()
    }
    graphs = []
    for rows in (3, 5):  # a function that looks at the number of rows gives two graphs
        x = torch.empty(rows, op.in_features, dtype=dtype_of(op.dtype), device="meta")
        try:
            with torch.no_grad():
                graphs.append(make_fx(op.function, pre_dispatch=True)(weights, x))
        except Exception as error:  # whatever the function or the tracer says of it
            raise UnsupportedError(
                f"op {op.name!r} cannot be captured: {type(error).__name__}: {error}; it may use its weights and x "
                "alone and may not branch on their values"
            ) from error
    if graphs[0].code != graphs[1].code:
        raise UnsupportedError(f"op {op.name!r} depends on the number of rows; ops must be token-wise")
    return _program(op, list(specs), graphs[0].graph)


def _program(op: Op, weight_names: list[str], graph: torch.fx.Graph) -> OpProgram:
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    registers = {inputs[-1]: 0}
    sources = {node: index for index, node in enumerate(inputs[:-1])}
    calls = []
    outputs: list[torch.fx.Node] = []
    for node in graph.nodes:
        if node.op == "output":
            result = node.args[0]
            outputs = list(result) if isinstance(result, (tuple, list)) else [result]
        elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            schema = node.target._schema
            if len(schema.returns) != 1 or str(schema.returns[0].type) != "Tensor" or schema.is_mutable:
                raise UnsupportedError(f"op {op.name!r} uses {node.target}, which does not give one new tensor")
            arguments = tuple(
                _argument(op, node, spec, value, registers, sources)
                for spec, value in zip(schema.arguments, _bound(node, schema), strict=True)
            )
            overload = node.target._overloadname
            calls.append((schema.name, "" if overload == "default" else overload, arguments))
            registers[node] = len(calls)
        elif node.op != "placeholder":
            raise UnsupportedError(f"op {op.name!r} uses {node.op} {node.target}; only its weights and x may be used")
    for node in outputs:
        if node not in registers or registers[node] == 0 or node.meta["val"].dim() != 2:
            raise UnsupportedError(f"op {op.name!r} must return new tensors of [rows, columns]")
    values = [node.meta["val"] for node in outputs]
    return OpProgram(
        weight_names=tuple(weight_names),
        calls=tuple(calls),
        outputs=tuple(registers[node] for node in outputs),
        output_columns=tuple(int(value.shape[1]) for value in values),
        output_dtypes=tuple(name_of(value.dtype) for value in values),
    )


def _bound(node: torch.fx.Node, schema: torch.FunctionSchema) -> list[Any]:
    """Every argument of the schema, defaults filled in: the dispatcher's stack has no gaps."""
    values = []
    for position, spec in enumerate(schema.arguments):
        if position < len(node.args):
            values.append(node.args[position])
        else:
            values.append(node.kwargs.get(spec.name, spec.default_value))
    return values


def _argument(
    op: Op,
    node: torch.fx.Node,
    spec: torch.Argument,
    value: Any,
    registers: Mapping[torch.fx.Node, int],
    sources: Mapping[torch.fx.Node, int],
) -> tuple[str, Any, bool]:
    kind = str(spec.type)
    optional = kind.startswith("Optional[")
    kind = kind.removeprefix("Optional[").removesuffix("]")
    if value is None and optional:
        return ("none", 0, False)
    if isinstance(value, torch.fx.Node) and kind == "Tensor":
        if value in registers:
            return ("register", registers[value], optional)
        return ("weight", sources[value], optional)
    if kind == "bool":
        return ("bool", bool(value), optional)
    if kind == "int" and isinstance(value, int):
        return ("int", value, optional)
    if kind == "float" and isinstance(value, float):
        return ("float", value, optional)
    raise UnsupportedError(
        f"op {op.name!r}: {node.target} takes {spec.name}={value!r} of type {kind}, which cannot run without Python; "
        "use linear, mul, silu, relu, sigmoid, tanh, embedding and the like"
    )


def make_kernel(op: Op, program: OpProgram, layer: LayerSpec, specs: Mapping[str, TensorSpec]) -> _C.OpKernel:
    """The kernel of an op for one layer: the program with that layer's offsets."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    _C.load_torch(str(library))
    ordered = [specs[short] for short in program.weight_names]
    return _C.torch_kernel(
        weights=[(layer.offsets[s.name], list(s.shape), list(s.strides), _SCALAR_TYPES[s.dtype]) for s in ordered],
        calls=[(name, overload, list(arguments)) for name, overload, arguments in program.calls],
        outputs=list(program.outputs),
        output_columns=list(program.output_columns),
        output_element_bytes=[DTYPE_BYTES[dtype] for dtype in program.output_dtypes],
        input_columns=op.in_features,
        input_dtype=_SCALAR_TYPES[op.dtype],
    )


def request_rows(op: Op, x: torch.Tensor, device: int | None) -> torch.Tensor:
    """``x`` as the rows of a request: [rows, in_features], row-major, on the pool's device, or ``ShapeError``."""
    where = torch.device("cpu") if device is None else torch.device("cuda", device)
    if x.dim() != 2 or x.shape[1] != op.in_features or x.dtype != dtype_of(op.dtype) or x.device != where:
        raise ShapeError(
            f"op {op.name!r} takes [rows, {op.in_features}] of {op.dtype} on {where}, not {list(x.shape)} of "
            f"{name_of(x.dtype)} on {x.device}"
        )
    return x if x.is_contiguous() else x.contiguous()


def reply_rows(
    program: OpProgram, rows: int, room: int, device: torch.device
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Room for an answer of ``room`` rows, and in it the outputs of [rows, columns]."""
    if len(program.output_columns) == 1:
        y = torch.empty(room, program.output_columns[0], dtype=dtype_of(program.output_dtypes[0]), device=device)
        return y, [y if rows == room else y[:rows]]
    flat = torch.empty(room, program.out_row_bytes, dtype=torch.uint8, device=device)
    return flat, reply_views(program, rows, room, flat)


def lent_views(program: OpProgram, rows: int, room: int, slot: _C.ByteView) -> list[torch.Tensor]:
    """``reply_views`` of a slot, for keeps: in inference mode they would be of use in that mode only."""
    with torch.inference_mode(False):
        return reply_views(program, rows, room, from_dlpack(slot))


def reply_views(program: OpProgram, rows: int, room: int, flat: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of [rows, columns] in the bytes of an answer of ``room`` rows, one block after the other."""
    outputs, start = [], 0
    for columns, dtype in zip(program.output_columns, program.output_dtypes, strict=True):
        num_bytes = room * columns * DTYPE_BYTES[dtype]
        outputs.append(flat.view(-1)[start : start + num_bytes].view(dtype_of(dtype)).view(room, columns)[:rows])
        start += num_bytes
    return outputs


# --- Operators for torch.compile ------------------------------------------------------------------------------------
#
# A compiled graph keeps operators in the order of their data. Fetching claims to change the layer's input and
# releasing to change its output, so that the products in between stay in between.

_handles = itertools.count()  # never given twice: a compiled graph keeps its own
_runtimes: weakref.WeakValueDictionary[int, Runtime] = weakref.WeakValueDictionary()


def register_runtime(runtime: Runtime) -> int:
    """A number by which the operators find the runtime; it does not keep it alive."""
    handle = next(_handles)
    _runtimes[handle] = runtime
    return handle


@torch.library.custom_op("sidp::fetch_layer", mutates_args=("x",))
def fetch_layer(x: torch.Tensor, handle: int, layer: int) -> None:
    """``Runtime.fetch_layer`` ordered before every use of ``x`` that follows."""
    _runtimes[handle].fetch_layer(layer)


@torch.library.custom_op("sidp::release_layer", mutates_args=("y",))
def release_layer(y: torch.Tensor, handle: int, layer: int) -> None:
    """``Runtime.release_layer`` ordered after what computes ``y``."""
    _runtimes[handle].release_layer(layer)


@torch.library.custom_op("sidp::remote_compute", mutates_args=())
def remote_compute(x: torch.Tensor, handle: int, layer: int, op: str) -> list[torch.Tensor]:
    """``Runtime.remote_compute``, always a list of tensors of their own: an operator's results may not share memory."""
    result = _runtimes[handle].remote_compute(layer, op, x)
    return [y.clone() for y in result] if isinstance(result, tuple) else [result]


@remote_compute.register_fake
def _(x: torch.Tensor, handle: int, layer: int, op: str) -> list[torch.Tensor]:
    program = _runtimes[handle].op_program(op, layer)
    columns = zip(program.output_columns, program.output_dtypes, strict=True)
    return [x.new_empty((x.shape[0], count), dtype=dtype_of(dtype)) for count, dtype in columns]
