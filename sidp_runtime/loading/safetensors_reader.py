"""Safetensors headers, read and checked without the library so that every failure has its numbers.

Layout of a file: 8 bytes little-endian header length, that many bytes of JSON, then the data. The
``data_offsets`` count from the start of the data, which the tensors must cover without gaps.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..manifest import DTYPE_BYTES
from .checkpoint import (
    Checkpoint,
    TensorEntry,
    check_no_overlap,
    read_json_object,
    regular_file_size,
    unreadable,
)

#: The format's own limit, in bytes.
MAX_HEADER_BYTES = 100_000_000

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def find_files(root: Path) -> list[Path]:
    """What to read in a directory: the single file, or the index, or every ``*.safetensors``, or nothing."""
    for name in (_SINGLE, _INDEX):
        # A dangling link is a missing file with a name, not "no model files".
        if (root / name).exists() or (root / name).is_symlink():
            return [root / name]
    return sorted(p for p in root.iterdir() if p.suffix == ".safetensors")


def open_directory(root: Path) -> Checkpoint:
    """Parse the headers of all files of a Hugging Face model directory; ``CheckpointError`` if one is wrong.

    With an index, the index decides which tensors exist; what it does not list is left out.
    """
    paths = find_files(root)
    if not paths:
        raise CheckpointError(f"{root} has no *.safetensors files")
    entries: dict[str, TensorEntry] = {}
    files: dict[str, int] = {}
    if paths[0].name == _INDEX:
        _read_sharded(root, paths[0], entries, files)
    else:
        for path in paths:
            _merge(entries, read_header(path))
            files[str(path)] = regular_file_size(path)
    config = root / "config.json"
    content = read_json_object(config) if config.exists() or config.is_symlink() else {}
    return Checkpoint(str(root), "safetensors", entries, content, files)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """All tensors of one safetensors file by name; ``CheckpointError`` if anything in the header is wrong."""
    size = regular_file_size(path)
    try:
        with path.open("rb") as handle:
            prefix = handle.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8:
                raise CheckpointError(f"{path} has {size} bytes, but 8 bytes of header length come first")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: header length {length} is over the format's limit of {MAX_HEADER_BYTES} bytes; "
                    f"this is not a safetensors file, or its start is damaged"
                )
            if length > size - 8:
                raise CheckpointError(
                    f"{path}: header length {length} reaches beyond the file, which has {size - 8} bytes "
                    f"after it; the file is truncated: download it again"
                )
            text = handle.read(length)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(text) < length:
        raise CheckpointError(f"{path}: truncated while it was read: {len(text)} of {length} header bytes")
    document = _parse(path, text)
    document.pop("__metadata__", None)
    base = 8 + length
    entries = {name: _entry(path, name, value, base, size) for name, value in document.items()}
    _check_cover(path, list(entries.values()), base, size)
    return entries


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise CheckpointError(f"{path}: header of {len(text)} bytes is not JSON: it starts with {text[:8]!r}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise CheckpointError(f"{path}: duplicated name {key!r} in the header of {len(text)} bytes")
            found[key] = value
        return found

    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:  # it is a ValueError too
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: header of {len(text)} bytes is not JSON: {error}") from error
    assert isinstance(document, dict)  # a text that starts with '{' parses to nothing else
    return document


def _entry(path: Path, name: str, value: Any, base: int, size: int) -> TensorEntry:
    where = f"{path}: tensor {name!r}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        keys = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise CheckpointError(f"{where} must have exactly dtype, shape and data_offsets, but has {keys}")
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    dtype = _DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise CheckpointError(f"{where}: unknown dtype {code!r}; known are {', '.join(_DTYPES)}")
    if not _naturals(shape):
        raise CheckpointError(f"{where}: shape {shape!r} is not a list of whole numbers of 0 or more")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {offsets!r} are not [begin, end], 0 <= begin <= end")
    begin, end = offsets
    if base + end > size:
        raise CheckpointError(
            f"{where}: bytes {base + begin}..{base + end} lie outside the file of {size} bytes; "
            f"the file is truncated: download it again"
        )
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != expected:
        raise CheckpointError(
            f"{where}: shape {shape} of {dtype} needs {expected} bytes, data_offsets give {end - begin}"
        )
    return TensorEntry(name, str(path), base + begin, expected, tuple(shape), dtype)


def _naturals(value: Any) -> bool:
    # bool is an int to isinstance; JSON true is not a size.
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_cover(path: Path, entries: list[TensorEntry], base: int, size: int) -> None:
    end, last = base, "the header"
    for entry in check_no_overlap(path, entries):
        if entry.offset != end:
            raise CheckpointError(
                f"{path}: {entry.offset - end} bytes at {end} between {last} and tensor {entry.name!r} "
                f"belong to no tensor; the header is damaged"
            )
        end, last = entry.offset + entry.num_bytes, f"tensor {entry.name!r}"
    if end != size:
        raise CheckpointError(f"{path}: the header accounts for {end} bytes but the file has {size}")


def _merge(into: dict[str, TensorEntry], found: dict[str, TensorEntry]) -> None:
    for name, entry in found.items():
        if name in into:
            raise CheckpointError(f"tensor {name!r} is duplicated: in {into[name].file} and in {entry.file}")
        into[name] = entry


def _read_sharded(root: Path, index: Path, entries: dict[str, TensorEntry], files: dict[str, int]) -> None:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        kind = type(weight_map).__name__
        raise CheckpointError(f"{index}: weight_map is {kind}, not an object from 1 or more names to files")
    shards: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        # Lexical on purpose: a hub cache keeps shards as links that lead out of the directory.
        if not isinstance(file, str) or file in {"", ".", ".."} or any(c in file for c in "/\\\0"):
            raise CheckpointError(
                f"{index}: tensor {name!r} names the file {file!r}: a shard must be a plain name in {root}"
            )
        shards.setdefault(file, []).append(name)
    every: dict[str, TensorEntry] = {}
    for number, (file, names) in enumerate(sorted(shards.items()), 1):
        path = root / file
        if not path.exists():
            raise CheckpointError(
                f"{path} is missing: shard {number} of {len(shards)}, named in {index.name} for {len(names)} "
                f"tensors; download it again"
            )
        header = read_header(path)
        for name in names:
            if name not in header:
                raise CheckpointError(
                    f"{path}: tensor {name!r}, which {index.name} puts there, is not among its {len(header)}"
                )
        _merge(every, header)
        files[str(path)] = regular_file_size(path)
    entries.update((name, every[name]) for name in weight_map)
