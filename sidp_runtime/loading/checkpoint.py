"""What a model directory or file holds: where each tensor's bytes lie, checked against the files."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

_JSON_VERSION = 1


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor.

    ``name`` is the Hugging Face name and ``shape`` is in torch order, for GGUF too. ``offset`` is absolute in
    ``file`` and, like ``num_bytes`` (as stored), in bytes. ``dtype`` is a key of ``DTYPE_BYTES`` or
    ``"gguf:<type>"``, for example ``"gguf:Q4_1"``. ``transform`` is ``""``, ``"llama-rope-q:<heads>"`` or
    ``"llama-rope-k:<heads>"``: the rows are stored in llama.cpp's rotary order and must be put back.
    """

    name: str
    file: str
    offset: int
    num_bytes: int
    shape: tuple[int, ...]
    dtype: str
    transform: str = ""


@dataclass
class Checkpoint:
    """The parsed header of a model: plain data, so that it can be parsed once and sent to every rank.

    ``format`` is ``"safetensors"`` or ``"gguf"``; ``root`` is the directory or the GGUF file; ``config`` is
    what ``config.json`` says (empty when a directory has none); ``files`` gives each file's size in bytes
    when it was parsed, so that a reader notices a file that changed since.
    """

    root: str
    format: str
    entries: dict[str, TensorEntry]
    config: dict[str, Any]
    files: dict[str, int] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Stored bytes of all tensors."""
        return sum(entry.num_bytes for entry in self.entries.values())

    def entry(self, name: str) -> TensorEntry:
        """The tensor of that name; ``CheckpointError`` names it and what is close to it."""
        found = self.entries.get(name)
        if found is not None:
            return found
        message = f"{self.root} has no tensor {name!r} among its {len(self.entries)}"
        if close := difflib.get_close_matches(name, self.entries, n=2):
            message += f"; the closest names are {', '.join(close)}"
        if name == "lm_head.weight" and self.config.get("tie_word_embeddings"):
            message += "; its config ties the head to the embedding, so use the embedding"
        raise CheckpointError(message)

    def to_json(self) -> str:
        """All of it as text, for ``from_json`` in another process."""
        document = {
            "version": _JSON_VERSION,
            "root": self.root,
            "format": self.format,
            "config": self.config,
            "files": self.files,
            "entries": [dataclasses.astuple(entry) for entry in self.entries.values()],
        }
        return json.dumps(document, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Checkpoint:
        """The checkpoint that ``to_json`` wrote; ``CheckpointError`` for anything else."""
        try:
            document = json.loads(text)
            if document["version"] != _JSON_VERSION:
                raise ValueError(f"version {document['version']!r}, expected {_JSON_VERSION}")
            entries = {}
            for name, file, offset, num_bytes, shape, dtype, transform in document["entries"]:
                extents = tuple(int(extent) for extent in shape)
                entries[name] = TensorEntry(name, file, int(offset), int(num_bytes), extents, dtype, transform)
            files = {str(path): int(size) for path, size in document["files"].items()}
            return cls(document["root"], document["format"], entries, dict(document["config"]), files)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{len(text)} characters of checkpoint JSON are not what Checkpoint.to_json writes: {error!r}"
            ) from error

    @classmethod
    def open(cls, path: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> Checkpoint:
        """Parse and validate the headers of a model; no tensor is read.

        ``path`` is a directory with ``model.safetensors``, ``model.safetensors.index.json`` or other
        ``*.safetensors`` files (looked for in this order), a directory with exactly one ``.gguf`` file, or a
        ``.gguf`` file. ``cache_dir`` (default ``config.cache_dir()``) keeps a GGUF's configuration, which is
        slow to parse.

        Raises ``CheckpointError`` for a file that is missing, damaged or untrue of its bytes, and
        ``UnsupportedError`` for a GGUF architecture or type that this package cannot convert.
        """
        from . import gguf_reader, safetensors_reader

        given = Path(path).absolute()
        if given.is_dir():
            if safetensors_reader.find_files(given):
                return safetensors_reader.open_directory(given)
            models = sorted(p for p in given.iterdir() if p.suffix == ".gguf")
            if len(models) == 1:
                return gguf_reader.open_file(models[0], cache_dir)
            if models:
                names = ", ".join(p.name for p in models)
                raise CheckpointError(f"{given} has {len(models)} .gguf files ({names}): give one's path")
            seen = len(list(given.iterdir()))
            raise CheckpointError(
                f"{given} has no model files: none of its {seen} entries is model.safetensors, "
                f"model.safetensors.index.json, *.safetensors or *.gguf"
            )
        if not given.exists():
            raise CheckpointError(f"{given} does not exist: give a model directory or a .gguf file")
        if given.suffix == ".gguf":
            return gguf_reader.open_file(given, cache_dir)
        raise CheckpointError(f"{given} is a file but not a .gguf: give the directory of safetensors files")


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error for a file that the system does not let us read."""
    return CheckpointError(f"{path} cannot be read: {error.strerror} (errno {error.errno})")


def regular_file_size(path: Path) -> int:
    """Bytes of a regular file (links are followed), or ``CheckpointError``."""
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        # Opening a pipe would block for ever.
        raise CheckpointError(f"{path} is not a regular file (mode {status.st_mode:o})")
    return status.st_size


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a small text file, or ``CheckpointError``."""
    size = regular_file_size(path)
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} ({size} bytes) is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} ({size} bytes) holds a JSON {type(document).__name__}, not an object")
    return document


def check_no_overlap(path: Path, entries: list[TensorEntry]) -> list[TensorEntry]:
    """The entries of one file in order of their bytes; ``CheckpointError`` if two share a byte."""
    ordered = sorted(entries, key=lambda e: (e.offset, e.num_bytes))
    for before, after in itertools.pairwise(ordered):
        if before.offset + before.num_bytes > after.offset:
            raise CheckpointError(
                f"{path}: tensors {before.name!r} and {after.name!r} overlap: {before.num_bytes} bytes at "
                f"{before.offset} and {after.num_bytes} bytes at {after.offset}"
            )
    return ordered
