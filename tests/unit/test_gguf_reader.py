"""GGUF: a small file with known contents, and damage. tests/integration/test_gguf_model.py reads a real one."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from helpers.gguf_model import read
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sidp_runtime.errors import CheckpointError, ConfigError, SidpError, UnsupportedError
from sidp_runtime.loading import Checkpoint, gguf_cache, source
from sidp_runtime.loading.gguf_reader import read_entries

pytestmark = pytest.mark.unit

HEADS, KV_HEADS, HIDDEN, INNER, VOCABULARY = 4, 2, 64, 96, 40
PREFIX = "model.layers.0."


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: pairs up the halves of each head."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    result: np.ndarray = halves.swapaxes(1, 2).reshape(weights.shape)
    return result


def tensors() -> dict[str, tuple[np.ndarray, str, gguf.GGMLQuantizationType]]:
    """Hugging Face name -> values, GGUF name, type."""
    rng = np.random.default_rng(1)
    kinds = gguf.GGMLQuantizationType

    def values(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    kv = HIDDEN // HEADS * KV_HEADS
    return {
        "model.embed_tokens.weight": (values(VOCABULARY, HIDDEN), "token_embd.weight", kinds.F16),
        "model.norm.weight": (values(HIDDEN), "output_norm.weight", kinds.F32),
        PREFIX + "input_layernorm.weight": (values(HIDDEN), "blk.0.attn_norm.weight", kinds.F32),
        PREFIX + "self_attn.q_proj.weight": (values(HIDDEN, HIDDEN), "blk.0.attn_q.weight", kinds.Q8_0),
        PREFIX + "self_attn.k_proj.weight": (values(kv, HIDDEN), "blk.0.attn_k.weight", kinds.F16),
        PREFIX + "self_attn.q_proj.bias": (values(HIDDEN), "blk.0.attn_q.bias", kinds.F32),
        PREFIX + "self_attn.v_proj.weight": (values(kv, HIDDEN), "blk.0.attn_v.weight", kinds.Q8_0),
        PREFIX + "mlp.down_proj.weight": (values(HIDDEN, INNER), "blk.0.ffn_down.weight", kinds.Q8_0),
        PREFIX + "mlp.up_proj.weight": (values(INNER, HIDDEN), "blk.0.ffn_up.weight", kinds.BF16),
    }


def write(path: Path, arch: str = "llama", extra: tuple[str, ...] = (), **metadata: Any) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(metadata.pop("blocks", 1))
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(metadata.pop("heads", HEADS))
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_array("tokenizer.test.tokens", ["", "a", "bc"])
    writer.add_array("tokenizer.test.scores", [0.5, 1.5])
    for key, value in metadata.items():
        name = key.replace("__", ".")
        writer.add_uint32(name, value) if isinstance(value, int) else writer.add_string(name, value)
    for hf_name, (values, name, kind) in tensors().items():
        heads = HEADS if "q_proj" in hf_name else KV_HEADS
        stored = permute(values, heads) if "q_proj" in hf_name or "k_proj" in hf_name else values
        writer.add_tensor(name, gguf.quantize(stored, kind), raw_dtype=kind)
    for name in extra:
        writer.add_tensor(name, np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


def parsed(path: Path) -> Checkpoint:
    return Checkpoint(str(path), "gguf", read_entries(path), {}, {str(path): path.stat().st_size})


@pytest.mark.parametrize("name", tensors())
@pytest.mark.parametrize("chunk", [source.CHUNK_ELEMENTS, 3 * HIDDEN])
def test_tiny_file_reads_back(tiny: Path, name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "CHUNK_ELEMENTS", chunk)
    values, _, kind = tensors()[name]
    checkpoint = parsed(tiny)
    assert checkpoint.entries.keys() == tensors().keys()
    assert checkpoint.entries[name].dtype == f"gguf:{kind.name}"
    assert checkpoint.entries[name].shape == values.shape
    # Quantisation works on rows, so doing it before the rows move gives the same numbers.
    expected = torch.from_numpy(gguf.dequantize(gguf.quantize(values, kind), kind).reshape(values.shape).copy())
    for dtype in ("float32", "float16", "bfloat16"):
        assert torch.equal(read(checkpoint, name, dtype), expected.to(getattr(torch, dtype)))


def test_open_gives_config_and_caches_it(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(tiny.parent, tmp_path)
    assert checkpoint.format == "gguf"
    assert checkpoint.root == str(tiny)
    config = checkpoint.config
    assert config["model_type"] == "llama"
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (HEADS, KV_HEADS)
    assert (config["hidden_size"], config["vocab_size"]) == (HIDDEN, VOCABULARY)
    assert config["tie_word_embeddings"] is True
    assert Checkpoint.from_json(checkpoint.to_json()) == checkpoint
    cached = list(tmp_path.rglob("config.json"))
    assert len(cached) == 1
    assert not list(tmp_path.rglob("*.tmp"))

    monkeypatch.setattr(gguf_cache, "_import_transformers", lambda: pytest.fail("the cache was not used"))
    assert Checkpoint.open(tiny, tmp_path) == checkpoint
    monkeypatch.undo()
    cached[0].write_text("{")  # damaged: made again
    assert Checkpoint.open(tiny, tmp_path) == checkpoint
    assert cached[0].stat().st_size > 100
    os.utime(tiny, ns=(1, 1))  # another modification time, another key
    Checkpoint.open(tiny, tmp_path)
    assert len(list(tmp_path.rglob("config.json"))) == 2
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written.*SIDP_CACHE_DIR"):
        Checkpoint.open(tiny, blocked)


def test_two_files_are_ambiguous(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"has 2 .gguf files \(a.gguf, b.gguf\)"):
        Checkpoint.open(tmp_path)


def test_truncated_anywhere_is_refused(tiny: Path, tmp_path: Path) -> None:
    content = tiny.read_bytes()
    path = tmp_path / "cut.gguf"
    first = min(entry.offset for entry in read_entries(tiny).values())
    last = max(entry.offset + entry.num_bytes for entry in read_entries(tiny).values())
    for size in (*range(0, first, 7), *range(first, last, 997), last - 1):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"truncated|starts with") as caught:
            read_entries(path)
        assert any(c.isdigit() for c in str(caught.value).replace(str(path), ""))


def field(content: bytes, name: str, after: int, fmt: str, value: int) -> bytes:
    """``content`` with a number replaced, ``after`` bytes behind a tensor's or key's name."""
    damaged = bytearray(content)
    position = content.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + after
    struct.pack_into(fmt, damaged, position, value)
    return bytes(damaged)


# Behind the name of a matrix: rank (4), two extents (16), type (4), offset (8).
Q = "blk.0.attn_q.weight"
DAMAGED: dict[str, tuple[Any, type[SidpError], str]] = {
    "magic": (lambda c: b"GGML" + c[4:], CheckpointError, r"starts with b'GGML'"),
    "version": (
        lambda c: c[:4] + struct.pack("<I", 1) + c[8:],
        UnsupportedError,
        r"version 1; supported are 2 and 3",
    ),
    "big-endian": (lambda c: c[:4] + struct.pack(">I", 3) + c[8:], UnsupportedError, r"50331648.*big-endian"),
    "tensor count": (
        lambda c: c[:8] + struct.pack("<Q", 1 << 60) + c[16:],
        CheckpointError,
        r"truncated.*needs \d+",
    ),
    "value type": (lambda c: field(c, "llama.block_count", 0, "<I", 77), CheckpointError, r"unknown type 77"),
    "item type": (lambda c: field(c, "tokenizer.test.tokens", 4, "<I", 78), CheckpointError, r"item type 78"),
    "item count": (
        lambda c: field(c, "tokenizer.test.scores", 8, "<Q", 1 << 61),
        CheckpointError,
        r"array .* of 2305843009213693952 items",
    ),
    "blocks": (
        lambda c: field(c, "llama.block_count", 4, "<I", 1 << 31),
        CheckpointError,
        r"2147483648 blocks.* 9 tensors",
    ),
    "no heads": (
        lambda c: field(c, "llama.attention.head_count", 4, "<I", 0),
        CheckpointError,
        r"head_count is 0",
    ),
    "odd heads": (
        lambda c: field(c, "llama.attention.head_count", 4, "<I", 5),
        CheckpointError,
        r"64 rows are not 5 heads",
    ),
    "rank": (lambda c: field(c, Q, 0, "<I", 9), CheckpointError, r"9 dimensions, not 1..4"),
    "extent": (lambda c: field(c, Q, 12, "<Q", 0), CheckpointError, r"\[64, 0\] have one below 1"),
    "extent too large": (
        lambda c: field(c, Q, 12, "<Q", 1 << 40),
        CheckpointError,
        r"outside the file of\s+\d+ bytes",
    ),
    "row not whole blocks": (
        lambda c: field(c, Q, 4, "<Q", 33),
        CheckpointError,
        r"rows of 33.*blocks of 32.*Q8_0",
    ),
    "type": (lambda c: field(c, Q, 20, "<I", 999), CheckpointError, r"unknown dtype number 999"),
    "type without values": (
        lambda c: field(c, Q, 20, "<I", 24),
        UnsupportedError,
        r"type I8 cannot be dequantised",
    ),
    "offset": (
        lambda c: field(c, Q, 24, "<Q", 1 << 40),
        CheckpointError,
        r"1099511\d+\.\.\d+ lie outside the file",
    ),
    "alignment": (lambda c: field(c, Q, 24, "<Q", 33), CheckpointError, r"offset 33 is not a multiple .* 32"),
    "overlap": (lambda c: field(c, Q, 24, "<Q", 32), CheckpointError, r"overlap: \d+ bytes at \d+ and"),
    "duplicated tensor": (
        lambda c: c.replace(b"blk.0.attn_k.weight", b"blk.0.attn_q.weight"),
        CheckpointError,
        r"duplicated tensor 'blk.0.attn_q.weight', \d of 9",
    ),
    "duplicated key": (
        lambda c: c.replace(b"tokenizer.test.tokens", b"tokenizer.test.scores"),
        CheckpointError,
        r"duplicated metadata key",
    ),
    "not UTF-8": (
        lambda c: c.replace(b"blk.0.attn_k", b"\xff\xfe\xfd.0.attn"),
        CheckpointError,
        r"at byte \d+:.*utf-8",
    ),
    "unknown tensor": (
        lambda c: c.replace(b"blk.0.attn_v.weight", b"blk.0.attn_z.weight"),
        UnsupportedError,
        r"attn_z.* no Hugging Face",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_each_damage_is_named_with_numbers(tiny: Path, tmp_path: Path, case: str) -> None:
    damage, kind, message = DAMAGED[case]
    content = tiny.read_bytes()
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damage(content))
    assert path.read_bytes() != content
    with pytest.raises(kind, match=message) as caught:
        read_entries(path)
    assert str(path) in str(caught.value)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=3))
def test_damaged_headers_raise_only_typed_errors(tiny: Path, tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    content = bytearray(tiny.read_bytes())
    header = min(entry.offset for entry in read_entries(tiny).values())
    for position, value in changes:
        content[position % header] = value
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    try:
        entries = read_entries(path)
    except (CheckpointError, UnsupportedError):
        return
    assert all(entry.offset + entry.num_bytes <= len(content) for entry in entries.values())


def test_what_would_be_quietly_wrong_is_refused(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"arch": "gpt2"}, r"architecture 'gpt2' is not one of llama, qwen2, qwen3"),
        ({"llama__rope__scaling__type": "yarn"}, r"rotary scaling 'yarn'"),
        ({"extra": ("rope_freqs.weight",)}, r"'rope_freqs.weight' .* no Hugging Face"),
        ({"extra": ("blk.1.attn_norm.weight",)}, r"'blk.1.attn_norm.weight' .* no Hugging Face"),
        ({"split__count": 3}, r"one of 3 parts"),
        ({"heads": [4, 2]}, r"differs by layer \(2 values\)"),
    ]
    for number, (options, message) in enumerate(cases):
        with pytest.raises(UnsupportedError, match=message):
            read_entries(write(tmp_path / f"{number}.gguf", **options))
    with pytest.raises(CheckpointError, match=r"alignment 48 is not a power of two"):
        read_entries(write(tmp_path / "alignment.gguf", general__alignment=48))


def test_rows_stay_in_place_outside_llama(tmp_path: Path) -> None:
    entries = read_entries(write(tmp_path / "q.gguf", arch="qwen2"))
    assert {entry.transform for entry in entries.values()} == {""}
