"""GGUF headers: metadata, tensor table and the way back to Hugging Face names.

The header is parsed here rather than by ``gguf.GGUFReader``, which maps the whole file, spends seconds on the
vocabulary and takes a truncated header for a short one. Names, type sizes and dequantisation are the
``gguf`` package's.
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import CheckpointError, UnsupportedError
from .checkpoint import Checkpoint, TensorEntry, check_no_overlap, regular_file_size, unreadable
from .gguf_cache import hf_config

if TYPE_CHECKING:
    from types import ModuleType

#: GGUF architectures whose tensors map one to one to Hugging Face modules, all decoders of Llama's form.
ARCHITECTURES = ("llama", "qwen2", "qwen3")

_MODULES = ("model.embed_tokens", "model.norm", "lm_head")
_LAYER_MODULES = (
    "input_layernorm",
    "post_attention_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "self_attn.q_norm",
    "self_attn.k_norm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)

# GGUF value type -> struct code
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_ARRAY_DEPTH = 4
_MAX_DIMENSIONS = 4


def import_gguf() -> ModuleType:
    """The ``gguf`` package, or ``UnsupportedError`` that says how to get it."""
    try:
        import gguf
    except ImportError as error:
        raise UnsupportedError(f"GGUF files need the gguf package ({error}): pip install gguf") from error
    return gguf


def open_file(path: Path, cache_dir: str | os.PathLike[str] | None = None) -> Checkpoint:
    """Parse and check the header of one GGUF file; see ``Checkpoint.open``."""
    size = regular_file_size(path)
    entries = read_entries(path)
    return Checkpoint(str(path), "gguf", entries, hf_config(path, cache_dir), {str(path): size})


def read_entries(path: Path) -> dict[str, TensorEntry]:
    """All tensors of a GGUF file by Hugging Face name.

    Raises ``CheckpointError`` for a damaged or truncated file, ``UnsupportedError`` for an architecture,
    tensor or type that cannot be converted faithfully.
    """
    size = regular_file_size(path)
    try:
        with path.open("rb") as handle:
            header = _Header(path, handle, size)
    except OSError as error:
        raise unreadable(path, error) from error
    return _to_hugging_face(path, header, size)


class _Header:
    """The parsed header.

    ``metadata`` is without arrays, of which only the length is kept; ``tensors`` are (name, dimensions, type
    number, offset from the start of the data).
    """

    def __init__(self, path: Path, handle: BinaryIO, size: int) -> None:
        self.path, self.handle, self.size, self.position = path, handle, size, 0
        self.metadata: dict[str, Any] = {}
        self.arrays: dict[str, int] = {}
        self.tensors: list[tuple[str, tuple[int, ...], int, int]] = []
        self._parse()

    def _truncated(self, count: int, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: truncated header: {what} needs {count} bytes at {self.position}, the file has "
            f"{self.size}; download it again"
        )

    def _take(self, count: int, what: str) -> bytes:
        data = self.handle.read(count) if self.position + count <= self.size else b""
        if len(data) < count:
            raise self._truncated(count, what)
        self.position += count
        return data

    def _skip(self, count: int, what: str) -> None:
        if self.position + count > self.size:
            raise self._truncated(count, what)
        self.position += count
        self.handle.seek(self.position)

    def _number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code), what))[0]

    def _text(self, what: str) -> str:
        data = self._take(self._number("Q", f"length of {what}"), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {what} at byte {self.position - len(data)}: {error}") from error

    def _parse(self) -> None:
        magic = self._take(4, "magic")
        if magic != b"GGUF":
            raise CheckpointError(f"{self.path} starts with {magic!r}, not b'GGUF': it is not a GGUF file")
        version = self._number("I", "version")
        if version not in (2, 3):
            hint = "it is big-endian" if version.to_bytes(4, "little")[3] in (2, 3) else "convert it again"
            raise UnsupportedError(
                f"{self.path} is GGUF version {version}; supported are 2 and 3, little-endian ({hint})"
            )
        num_tensors, num_values = self._number("Q", "tensor count"), self._number("Q", "metadata count")
        for number in range(num_values):
            key = self._text(f"key {number} of {num_values}")
            if key in self.metadata or key in self.arrays:
                raise CheckpointError(f"{self.path}: duplicated metadata key {key!r}, {number} of {num_values}")
            self._value(key, self._number("I", f"type of {key}"))
        seen: set[str] = set()
        for number in range(num_tensors):
            name = self._text(f"name of tensor {number} of {num_tensors}")
            if name in seen:
                raise CheckpointError(f"{self.path}: duplicated tensor {name!r}, {number} of {num_tensors}")
            seen.add(name)
            rank = self._number("I", f"dimension count of {name}")
            if not 1 <= rank <= _MAX_DIMENSIONS:
                raise CheckpointError(f"{self.path}: tensor {name!r} has {rank} dimensions, not 1..{_MAX_DIMENSIONS}")
            dims = struct.unpack(f"<{rank}Q", self._take(8 * rank, f"dimensions of {name}"))
            kind, offset = struct.unpack("<IQ", self._take(12, f"type and offset of {name}"))
            self.tensors.append((name, dims, kind, offset))

    def _value(self, key: str, kind: int) -> None:
        if kind == _STRING:
            self.metadata[key] = self._text(f"value of {key}")
        elif kind == _ARRAY:
            self.arrays[key] = self._skip_array(key, 1)
        elif kind in _SCALARS:
            self.metadata[key] = self._number(_SCALARS[kind], f"value of {key}")
        else:
            raise CheckpointError(f"{self.path}: metadata {key!r} at byte {self.position} has unknown type {kind}")

    def _skip_array(self, key: str, depth: int) -> int:
        kind, count = struct.unpack("<IQ", self._take(12, f"array header of {key}"))
        if kind in _SCALARS:
            self._skip(count * struct.calcsize("<" + _SCALARS[kind]), f"array {key} of {count} items")
        elif kind == _STRING:
            for _ in range(count):
                self._skip(self._number("Q", f"length in {key}"), f"text in {key}")
        elif kind == _ARRAY and depth < _MAX_ARRAY_DEPTH:
            for _ in range(count):
                self._skip_array(key, depth + 1)
        else:
            raise CheckpointError(f"{self.path}: array {key!r} at depth {depth} has unknown item type {kind}")
        return int(count)

    def natural(self, key: str, default: int | None = None) -> int:
        """A whole number above 0 from the metadata."""
        value = self.metadata.get(key, default)
        if key in self.arrays:
            raise UnsupportedError(f"{self.path}: {key} differs by layer ({self.arrays[key]} values)")
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{self.path}: metadata {key} is {value!r}, not a whole number from 1")
        return value


def _to_hugging_face(path: Path, header: _Header, size: int) -> dict[str, TensorEntry]:
    gguf = import_gguf()
    architecture = header.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise UnsupportedError(f"{path}: architecture {architecture!r} is not one of {supported}")
    parts = header.metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise UnsupportedError(f"{path} is one of {parts} parts: merge them with llama-gguf-split --merge")
    scaling = header.metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        # The configuration made from GGUF metadata would leave it out, and the model would be quietly wrong.
        raise UnsupportedError(
            f"{path}: rotary scaling {scaling!r} is not carried over from GGUF; use the model's safetensors"
        )
    alignment = header.natural("general.alignment", 32)
    if alignment & (alignment - 1):
        raise CheckpointError(f"{path}: general.alignment {alignment} is not a power of two")
    start = -(-header.position // alignment) * alignment

    names = _name_map(gguf, path, header, architecture)
    decodable: dict[Any, bool] = {}
    entries: list[TensorEntry] = []
    for name, dims, kind, offset in header.tensors:
        where = f"{path}: tensor {name!r}"
        num_bytes, type_name = _stored(gguf, where, dims, kind, decodable)
        if offset % alignment:
            raise CheckpointError(f"{where}: offset {offset} is not a multiple of the alignment {alignment}")
        if start + offset + num_bytes > size:
            raise CheckpointError(
                f"{where}: bytes {start + offset}..{start + offset + num_bytes} lie outside the file of "
                f"{size} bytes; the file is truncated: download it again"
            )
        base, _, suffix = name.rpartition(".")
        if base not in names or suffix not in ("weight", "bias"):
            raise UnsupportedError(f"{where} of architecture {architecture} has no Hugging Face module here")
        shape = tuple(reversed(dims))
        entries.append(
            TensorEntry(
                f"{names[base]}.{suffix}",
                str(path),
                start + offset,
                num_bytes,
                shape,
                f"gguf:{type_name}",
                _transform(header, where, architecture, base, shape),
            )
        )
    check_no_overlap(path, entries)
    return {entry.name: entry for entry in entries}


def _name_map(gguf: ModuleType, path: Path, header: _Header, architecture: str) -> dict[str, str]:
    blocks = header.natural(f"{architecture}.block_count")
    if blocks > len(header.tensors):
        raise CheckpointError(f"{path}: {blocks} blocks are declared, but {len(header.tensors)} tensors stored")
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    to_gguf = gguf.get_tensor_name_map(arch, blocks)
    modules = [*_MODULES, *(f"model.layers.{i}.{module}" for i in range(blocks) for module in _LAYER_MODULES)]
    return {gguf_name: module for module in modules if (gguf_name := to_gguf.get_name(module)) is not None}


def _stored(
    gguf: ModuleType, where: str, dims: tuple[int, ...], kind: int, decodable: dict[Any, bool]
) -> tuple[int, str]:
    """Bytes as stored and the name of the type; ``decodable`` remembers which types were tried."""
    if min(dims) < 1:
        raise CheckpointError(f"{where}: dimensions {list(dims)} have one below 1")
    try:
        qtype = gguf.GGMLQuantizationType(kind)
    except ValueError:
        raise CheckpointError(f"{where}: unknown dtype number {kind}") from None
    block, block_bytes = gguf.GGML_QUANT_SIZES[qtype]
    if dims[0] % block:
        raise CheckpointError(f"{where}: rows of {dims[0]} are not whole blocks of {block} values of {qtype.name}")
    if qtype not in decodable:
        import numpy as np

        try:
            gguf.dequantize(np.zeros((1, block_bytes), np.uint8), qtype)
        except NotImplementedError as error:
            raise UnsupportedError(f"{where}: type {qtype.name} cannot be dequantised by gguf: {error}") from error
        decodable[qtype] = True
    return math.prod(dims) // block * block_bytes, qtype.name


def _transform(header: _Header, where: str, architecture: str, base: str, shape: tuple[int, ...]) -> str:
    projection = base.rpartition(".")[2]
    if architecture != "llama" or projection not in ("attn_q", "attn_k"):
        return ""
    heads = header.natural("llama.attention.head_count")
    if projection == "attn_k":
        heads = header.natural("llama.attention.head_count_kv", heads)
    if shape[0] % (2 * heads):
        raise CheckpointError(f"{where}: {shape[0]} rows are not {heads} heads of an even size")
    return f"llama-rope-{projection[-1]}:{heads}"
