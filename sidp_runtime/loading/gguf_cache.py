"""What is slow to get out of a GGUF file, kept on disk: its Hugging Face configuration and its tokenizer.

Both come from ``transformers``, which spends seconds on the vocabulary. The key covers the file's path, size,
modification time and first MiB and the versions of the packages that parsed it, so nothing stale is served.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from .. import config as settings
from ..errors import CheckpointError, ConfigError, UnsupportedError
from .checkpoint import Checkpoint, unreadable

_FORMAT = 1
_KEY_BYTES = 1 << 20


def hf_config(path: Path, cache_dir: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """The Hugging Face configuration of a GGUF file (JSON types), from the cache or by ``AutoConfig``."""
    place = _place(path, cache_dir)
    file = place / "config.json"
    try:
        document = json.loads(file.read_bytes())
        if isinstance(document, dict) and document.get("model_type"):
            return document
    except (OSError, ValueError):
        pass  # absent or damaged: made again below
    transformers = _import_transformers()
    try:
        parsed = transformers.AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        document = json.loads(parsed.to_json_string(use_diff=False))
    except Exception as error:  # transformers raises what its parsers happen to raise
        raise CheckpointError(
            f"{path}: transformers {transformers.__version__} finds no configuration in it: {error!r}"
        ) from error
    document = {key: value for key, value in document.items() if not key.startswith("_")}
    if not document.get("model_type"):
        raise CheckpointError(f"{path}: transformers made a configuration of {len(document)} keys, no model_type")
    _make(place)
    handle, name = tempfile.mkstemp(dir=place, prefix="config.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(document, stream, indent=1)
        Path(name).replace(file)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise _cannot_write(place, error) from error
    return document


def tokenizer_dir(checkpoint: Checkpoint, cache_dir: str | os.PathLike[str] | None = None) -> str:
    """A directory that ``AutoTokenizer.from_pretrained`` reads quickly.

    A Hugging Face directory is its own; for GGUF the tokenizer is converted once into the cache.
    """
    if checkpoint.format != "gguf":
        return checkpoint.root
    path = Path(checkpoint.root)
    place = _place(path, cache_dir)
    final = place / "tokenizer"
    if (final / "tokenizer_config.json").exists():
        return str(final)
    transformers = _import_transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except Exception as error:  # as above
        raise CheckpointError(
            f"{path}: transformers {transformers.__version__} finds no tokenizer in it: {error!r}"
        ) from error
    _make(place)
    scratch = Path(tempfile.mkdtemp(dir=place, prefix="tokenizer.", suffix=".tmp"))
    try:
        tokenizer.save_pretrained(str(scratch))
        if final.exists() and not (final / "tokenizer_config.json").exists():
            shutil.rmtree(final)
        scratch.replace(final)
    except OSError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if not (final / "tokenizer_config.json").exists():  # else another process was first
            raise _cannot_write(place, error) from error
    return str(final)


def _place(path: Path, cache_dir: str | os.PathLike[str] | None) -> Path:
    try:
        with path.open("rb") as handle:
            status = os.fstat(handle.fileno())
            start = hashlib.sha256(handle.read(_KEY_BYTES)).hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error
    parsers = [f"{name} {_version(name)}" for name in ("transformers", "gguf", "tokenizers")]
    identity = (_FORMAT, path.absolute(), status.st_size, status.st_mtime_ns, start, *parsers)
    text = "\n".join(str(part) for part in identity)
    root = settings.cache_dir() if cache_dir is None else Path(cache_dir)
    return root / "gguf" / hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UnsupportedError(
            f"a GGUF's configuration and tokenizer need transformers ({error}): pip install transformers"
        ) from error
    return transformers


def _make(place: Path) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(place, error) from error


def _cannot_write(place: Path, error: OSError) -> ConfigError:
    return ConfigError(f"the cache {place} cannot be written: {error}; set SIDP_CACHE_DIR to another directory")
