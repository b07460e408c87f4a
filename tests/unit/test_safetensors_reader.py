"""Safetensors headers: what is valid reads byte for byte, and what is not is refused with its numbers."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from sidp_runtime.errors import CheckpointError, ShapeError, UnsupportedError
from sidp_runtime.loading import Checkpoint, CheckpointSource
from sidp_runtime.loading.safetensors_reader import read_header
from sidp_runtime.manifest import TensorSpec

pytestmark = pytest.mark.unit

DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint8": np.uint8,
    "bool": np.bool_,
}
RELAXED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header: an object for JSON, or raw bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def tensor(dtype: Any, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def read(checkpoint: Checkpoint, spec: TensorSpec) -> bytes:
    out = bytearray(spec.num_bytes)
    with CheckpointSource(checkpoint) as source:
        source.read_into(spec.name, memoryview(out), spec)
    return bytes(out)


@RELAXED
@given(
    tensors=st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_categories=["Z", "C"]), min_size=1, max_size=12).filter(
            lambda name: name != "__metadata__" and not any(c.isspace() for c in name)
        ),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(1, 5), max_size=4), st.integers(0, 2**32)),
        min_size=1,
        max_size=6,
    )
)
def test_what_the_library_writes_reads_back_byte_for_byte(tmp_path: Path, tensors: dict[str, Any]) -> None:
    arrays = {}
    for name, (dtype, shape, seed) in tensors.items():
        raw = np.random.default_rng(seed).bytes(int(np.prod(shape, dtype=int)) * np.dtype(DTYPES[dtype]).itemsize)
        bits = np.frombuffer(raw, np.uint8) & 1 if dtype == "bool" else np.frombuffer(raw, np.uint8)
        arrays[name] = bits.view(DTYPES[dtype]).reshape(shape).copy()
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.entries.keys() == arrays.keys()
    assert checkpoint.total_bytes == sum(a.nbytes for a in arrays.values())
    for name, array in arrays.items():
        assert read(checkpoint, TensorSpec(name, array.shape, tensors[name][0])) == array.tobytes()
    assert Checkpoint.from_json(checkpoint.to_json()) == checkpoint


@settings(RELAXED, max_examples=400)
@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=3))
def test_damaged_headers_are_refused_or_harmless(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    arrays: dict[str, np.ndarray] = {
        "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
        "b": np.arange(5, dtype=np.int64),
        "c": np.arange(6, dtype=np.float16),
    }
    path = tmp_path / "model.safetensors"
    save_file(arrays, path)
    content = bytearray(path.read_bytes())
    header = 8 + struct.unpack_from("<Q", content)[0]
    for position, value in changes:
        content[position % header] = value
    path.write_bytes(content)
    for name, array in arrays.items():
        spec = TensorSpec(name, array.shape, array.dtype.name)
        problem: Exception | None = None
        try:
            # A flip from F16 to I16 is a header like any other: then the declared dtype does not agree.
            assert read(Checkpoint.open(tmp_path), spec) == array.tobytes()
        except (CheckpointError, ShapeError, UnsupportedError) as error:
            problem = error
        assert problem is None or str(path) in str(problem) or name in str(problem)


GOOD = tensor("F32", [2], 0, 8)
DAMAGED: dict[str, tuple[Any, bytes, int | None, str]] = {
    "header length beyond the file": ({"a": GOOD}, bytes(8), 5000, r"length 5000 .*beyond.* has 6\d bytes"),
    "header length beyond any file": ({"a": GOOD}, bytes(8), 1 << 40, r"1099511627776.*limit of 100000000"),
    "not JSON": (b"{'a': 1}", b"", None, r"8 bytes is not JSON"),
    "not an object": (b"[1, 2]", b"", None, r"6 bytes is not JSON"),
    "deep nesting": (b'{"a":' + b"[" * 200_000, b"", None, r"200005 bytes is not JSON"),
    "huge number": (b'{"a":' + b"9" * 5000 + b"}", b"", None, r"500\d bytes is not JSON"),
    "overlap": (
        {"a": GOOD, "b": tensor("F32", [2], 4, 12)},
        bytes(12),
        None,
        r"'a' and 'b' overlap: 8 bytes at",
    ),
    "hole": (
        {"a": GOOD, "b": tensor("F32", [1], 12, 16)},
        bytes(16),
        None,
        r"4 bytes at \d+ between tensor 'a'",
    ),
    "out of the file": (
        {"a": tensor("F32", [4], 0, 16)},
        bytes(12),
        None,
        r"'a'.*outside the file of \d+ bytes",
    ),
    "bytes left over": ({"a": GOOD}, bytes(9), None, r"accounts for \d+ bytes but the file has \d+"),
    "size and shape differ": (
        {"a": tensor("F32", [3], 0, 8)},
        bytes(8),
        None,
        r"\[3\].*needs 12 bytes.*give 8",
    ),
    "unknown dtype": ({"a": tensor("F4", [8], 0, 8)}, bytes(8), None, r"unknown dtype 'F4'; known are F64"),
    "dtype not text": ({"a": tensor(["F32"], [2], 0, 8)}, bytes(8), None, r"unknown dtype \['F32'\]"),
    "negative shape": ({"a": tensor("F32", [-1, -2], 0, 8)}, bytes(8), None, r"shape \[-1, -2\] is not"),
    "boolean shape": ({"a": tensor("F32", [2, True], 0, 8)}, bytes(8), None, r"shape \[2, True\] is not"),
    "offsets reversed": ({"a": tensor("F32", [2], 8, 0)}, bytes(8), None, r"data_offsets \[8, 0\]"),
    "offsets negative": ({"a": tensor("F32", [2], -8, 0)}, bytes(8), None, r"data_offsets \[-8, 0\]"),
    "offsets fractional": ({"a": tensor("F32", [2], 0.0, 8.0)}, bytes(8), None, r"data_offsets \[0.0, 8.0\]"),
    "key missing": (
        {"a": {"dtype": "F32", "shape": [2]}},
        bytes(8),
        None,
        r"exactly.*has \['dtype', 'shape'\]",
    ),
    "not a tensor": ({"a": 7}, bytes(8), None, r"'a' must have exactly.*int"),
    "duplicated": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"x",
        None,
        r"duplicated name 'a' in the header of 1\d\d bytes",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_each_damage_is_named_with_numbers(tmp_path: Path, case: str) -> None:
    header, data, length, message = DAMAGED[case]
    path = write(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(tmp_path)
    assert str(path) in str(caught.value)


def test_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.arange(4, dtype=np.float32)}, path)
    content = path.read_bytes()
    assert read_header(path)["a"].num_bytes == 16
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"\d"):
            read_header(path)
    path.write_bytes(content[:5])
    with pytest.raises(CheckpointError, match=r"has 5 bytes, but 8 bytes of header length"):
        read_header(path)


def sharded(root: Path, weight_map: dict[str, Any]) -> None:
    save_file({"a": np.zeros(2, np.float32), "extra": np.zeros(1, np.float32)}, root / "m-1.safetensors")
    save_file({"b": np.ones(3, np.float16)}, root / "m-2.safetensors")
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_sharded_model_with_links_and_config(tmp_path: Path) -> None:
    blobs, root = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    root.mkdir()
    sharded(root, {"a": "m-1.safetensors", "b": "m-2.safetensors"})
    for shard in list(root.glob("*.safetensors")):
        blob = shard.rename(blobs / shard.name)
        shard.symlink_to(Path("..") / "blobs" / blob.name)  # as a hub cache does
    (root / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = Checkpoint.open(root)
    assert sorted(checkpoint.entries) == ["a", "b"]
    assert checkpoint.config == {"model_type": "llama"}
    assert read(checkpoint, TensorSpec("b", (3,), "float16")) == np.ones(3, np.float16).tobytes()


@pytest.mark.parametrize(
    "name", ["../m-1.safetensors", "/etc/passwd", "..", ".", "", "sub/m.safetensors", "a\\b", "m\0", 7, None]
)
def test_index_cannot_leave_the_directory(tmp_path: Path, name: Any) -> None:
    root = tmp_path / "model"
    root.mkdir()
    sharded(root, {"a": name})
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "m-1.safetensors")
    with pytest.raises(CheckpointError, match=r"must be a plain name in"):
        Checkpoint.open(root)


def test_index_that_is_untrue_of_its_shards(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": "m-1.safetensors", "b": "m-3.safetensors"})
    with pytest.raises(CheckpointError, match=r"m-3.safetensors is missing: shard 2 of 2, .* for 1 tensors"):
        Checkpoint.open(tmp_path)
    sharded(tmp_path, {"a": "m-1.safetensors", "c": "m-2.safetensors"})
    with pytest.raises(CheckpointError, match=r"'c', which .* puts there, is not among its 1"):
        Checkpoint.open(tmp_path)
    sharded(tmp_path, {"a": "m-1.safetensors", "b": "m-2.safetensors"})
    save_file({"b": np.ones(3, np.float16), "a": np.zeros(2, np.float32)}, tmp_path / "m-2.safetensors")
    with pytest.raises(CheckpointError, match=r"'a' is duplicated: in .*m-1.safetensors and in .*m-2.safetensors"):
        Checkpoint.open(tmp_path)
    for text in ('{"weight_map": {}}', '{"weight_map": []}', "{}"):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"weight_map is .*1 or more"):
            Checkpoint.open(tmp_path)
    for text, message in (("{", r"\(1 bytes\) is not JSON"), ("[]", r"\(2 bytes\) holds a JSON list")):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(tmp_path)


def test_unindexed_shards_and_their_duplicates(tmp_path: Path) -> None:
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "x.safetensors")
    save_file({"b": np.zeros(2, np.float32)}, tmp_path / "y.safetensors")
    assert sorted(Checkpoint.open(tmp_path).entries) == ["a", "b"]
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match=r"'a' is duplicated: in .*x.safetensors and in .*y.safetensors"):
        Checkpoint.open(tmp_path)


def test_nothing_to_open(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model files: none of its 0 entries"):
        Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match=r"does not exist"):
        Checkpoint.open(tmp_path / "absent")
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is a file but not a .gguf"):
        Checkpoint.open(tmp_path / "model.bin")
    (tmp_path / "model.safetensors").symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read: .*errno 2"):
        Checkpoint.open(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"not a regular file \(mode 4"):
        Checkpoint.open(tmp_path)


def test_bad_config_and_bad_json(tmp_path: Path) -> None:
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    assert Checkpoint.open(tmp_path).config == {}
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"config.json \(3 bytes\) holds a JSON list"):
        Checkpoint.open(tmp_path)
    for text in ("", "[]", '{"version": 99}', '{"version": 1}'):
        with pytest.raises(CheckpointError, match=rf"^{len(text)} characters of checkpoint JSON"):
            Checkpoint.from_json(text)
