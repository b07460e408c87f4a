"""Filling the model: from safetensors, of which only what this rank holds is read, or made up from the names."""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ..._torch import dtype_of
from ...errors import CheckpointError, ConfigError, UnsupportedError
from ...loading import Checkpoint, LoadReport, ReadAhead, TensorEntry
from ...loading.read_ahead import Bytes, fresh_memory

# Stored linears of a decoder layer: parts of vLLM's merged ones, and the merged ones themselves. Scales of the KV cache
# may stand below them too; those belong to the attention, which every rank has whole.
_STORED = re.compile(
    r"(?:^|\.)layers\.(\d+)\.(?:self_attn\.(?:q|k|v|qkv|o)_proj|mlp\.(?:gate|up|gate_up|down)_proj)"
    r"\.(?:weight|bias|weight_scale|weight_scale_inv|input_scale)$"
)

# Larger tensors (an embedding) are copied by the driver: torch keeps page-locked memory, in powers of two, for the next
_MOST_LOCKED_BYTES = 512 << 20


class Weights(Protocol):
    """Where a model's weights come from."""

    def expect(self, layers: Sequence[int]) -> None:
        """Before the first ``fill``: the layers that are filled, in this order; the rest comes after them."""

    def fill(self, layer: int | None, parameters: Mapping[str, nn.Parameter]) -> None:
        """Fills ``parameters``, by their name in the model: the pooled ones of a decoder layer, or (None) the rest."""

    def report(self) -> tuple[LoadReport, int]:
        """What was read, and the bytes of the whole checkpoint."""

    def close(self) -> None:
        """Ends what still reads."""


class StoredWeights:
    """A checkpoint's, through the model's own ``load_weights``. Host memory: what ``ReadAhead`` holds.

    ``page_locked``: it is read into memory from which a GPU copies by itself. Torch keeps such memory in powers of two
    for tensors of the same size until the end: of layers that are alike about 2 GiB.
    """

    def __init__(self, model: Any, path: str, num_layers: int, *, page_locked: bool = False) -> None:
        if not Path(path).is_dir():
            raise ConfigError(f"model {path!r} is not a directory: download it first, and give the folder")
        self._checkpoint = Checkpoint.open(path)
        if self._checkpoint.format != "safetensors":
            raise UnsupportedError(f"{path} is {self._checkpoint.format}; load_format='sidp' reads safetensors")
        self._model, self._path = model, path
        self._tensors = self._bytes = 0
        self._seconds = 0.0
        self._by_layer: dict[int | None, list[TensorEntry]] = {}
        for entry in sorted(self._checkpoint.entries.values(), key=lambda e: (e.file, e.offset)):
            stored = _STORED.search(entry.name)
            layer = int(stored[1]) if stored else None
            if layer is not None and layer >= num_layers:
                raise CheckpointError(f"{path} has {entry.name!r}, the model has {num_layers} decoder layers")
            self._by_layer.setdefault(layer, []).append(entry)
        self._page_locked = page_locked
        self._source: ReadAhead | None = None
        self._ahead: Iterator[tuple[TensorEntry, Bytes]] = iter(())

    def expect(self, layers: Sequence[int]) -> None:
        entries = [entry for layer in (*layers, None) for entry in self._by_layer.get(layer, [])]
        self._source = ReadAhead(self._checkpoint, allocate=_page_locked if self._page_locked else fresh_memory)
        self._ahead = self._source.tensors(entries)

    def fill(self, layer: int | None, parameters: Mapping[str, nn.Parameter]) -> None:
        """``CheckpointError`` if the checkpoint lacks one."""
        begin = time.perf_counter()
        last = self._tensors + len(self._by_layer.get(layer, []))
        loaded = self._model.load_weights(self._stored(last))
        if not isinstance(loaded, set):
            raise UnsupportedError(
                f"{type(self._model).__name__}.load_weights does not say what it loaded, so no gap would show"
            )
        if missing := [name for name in parameters if name not in loaded]:
            raise CheckpointError(f"{self._path} lacks {len(missing)} tensors of the model: {', '.join(missing[:4])}")
        for _ in self._stored(last):  # what the model did not ask for is not the next layer's
            pass
        self._seconds += time.perf_counter() - begin

    def _stored(self, last: int) -> Iterator[tuple[str, torch.Tensor]]:
        while self._tensors < last:
            entry, stored = next(self._ahead)
            self._tensors += 1
            self._bytes += stored.nbytes
            yield entry.name, torch.from_numpy(stored).view(dtype_of(entry.dtype)).view(entry.shape)

    def report(self) -> tuple[LoadReport, int]:
        read = self._source.bytes_read if self._source is not None else 0
        return LoadReport(read, self._bytes, self._seconds, self._tensors), self._checkpoint.total_bytes

    def close(self) -> None:
        if self._source is not None:
            self._source.close()
            self._ahead = iter(())
            if self._page_locked:  # torch keeps it for its next use; 2.11 has the second name alone
                (getattr(torch.accelerator, "empty_host_cache", None) or torch._C._host_emptyCache)()


def _page_locked(num_bytes: int) -> Bytes:
    if num_bytes > _MOST_LOCKED_BYTES:
        return fresh_memory(num_bytes)
    found: Bytes = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
    return found


class MadeUpWeights:
    """Random ones, each from its own name: a layer in the wrong place shows. vLLM's dummies are equal in all layers.

    Matrices are normal with a deviation of 0.02 around 0, vectors around 1 (norms) or, biases, around 0. Matrices with
    scales beside them have a deviation of 1, and the scales are 0.02 to 0.03.
    """

    def __init__(self) -> None:
        self._tensors = self._bytes = 0
        self._seconds = 0.0

    def expect(self, layers: Sequence[int]) -> None:
        pass

    def fill(self, layer: int | None, parameters: Mapping[str, nn.Parameter]) -> None:
        begin = time.perf_counter()
        for name, value in parameters.items():
            generator = torch.Generator(device=value.device).manual_seed(zlib.crc32(name.encode()))
            scaled = value.element_size() == 1  # fp8, for which there are no random numbers
            numbers = torch.empty(value.shape, device=value.device) if scaled else value.data
            if name.endswith(("scale", "scale_inv")):
                numbers.uniform_(0.02, 0.03, generator=generator)
            else:
                numbers.normal_(
                    1.0 if name.endswith("norm.weight") else 0.0, 1.0 if scaled else 0.02, generator=generator
                )
            if scaled:
                value.data.copy_(numbers)
            self._bytes += value.nbytes
            self._tensors += 1
        self._seconds += time.perf_counter() - begin

    def report(self) -> tuple[LoadReport, int]:
        return LoadReport(0, self._bytes, self._seconds, self._tensors), 0

    def close(self) -> None:
        pass
