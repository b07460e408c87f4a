"""Shapes of the layers that cases use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A decoder layer's token-wise part, without norms; features are columns, ``layers`` how many a pool has.

    ``sizes``: bytes of the copies that cases sweep. ``tokens``: rows of steps. ``cas_rows``: of the largest request.
    """

    name: str
    hidden: int
    attention: int  # columns of the attention's output, the input of o
    qkv: int
    intermediate: int
    layers: int
    dtype: str
    sizes: tuple[int, ...]
    tokens: tuple[int, ...]
    cas_rows: int

    @property
    def tensors(self) -> dict[str, tuple[int, int]]:
        """[out, in] of each weight."""
        return {
            "o": (self.hidden, self.attention),
            "gate": (self.intermediate, self.hidden),
            "up": (self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
            "qkv": (self.qkv, self.hidden),
        }

    @property
    def features(self) -> int:
        """Columns of a request: the attention's output and the residual."""
        return self.attention + self.hidden

    def step_tokens(self, quick: bool) -> tuple[int, ...]:
        return (self.tokens[0], self.tokens[len(self.tokens) // 2]) if quick else self.tokens

    def copy_sizes(self, quick: bool) -> tuple[int, ...]:
        return (self.sizes[0], self.sizes[-1]) if quick else self.sizes


_KIB, _MIB = 1 << 10, 1 << 20
_SIZES = (64 * _KIB, 256 * _KIB, _MIB, 4 * _MIB, 16 * _MIB, 64 * _MIB, 256 * _MIB, 1024 * _MIB)
_TOKENS = (1, 16, 32, 64, 128, 256, 512, 768, 1024, 1536, 2048, 4096)

_TABLE = (
    Shape(  # https://huggingface.co/Qwen/Qwen3-32B, config.json; 16 of its 64 layers, 0.975 GB each
        "qwen3-32b",
        hidden=5120,
        attention=8192,
        qkv=10240,
        intermediate=25600,
        layers=16,
        dtype="bfloat16",
        sizes=_SIZES,
        tokens=_TOKENS,
        cas_rows=1024,
    ),
    Shape(  # https://huggingface.co/meta-llama/Llama-3.1-70B, config.json; 8 of its 80 layers, 1.71 GB each
        "llama-3.1-70b",
        hidden=8192,
        attention=8192,
        qkv=10240,
        intermediate=28672,
        layers=8,
        dtype="bfloat16",
        sizes=_SIZES,
        tokens=_TOKENS,
        cas_rows=1024,
    ),
    Shape(
        "medium",
        hidden=512,
        attention=512,
        qkv=768,
        intermediate=1536,
        layers=8,
        dtype="float32",
        sizes=(64 * _KIB, _MIB, 4 * _MIB, 16 * _MIB, 64 * _MIB),
        tokens=(1, 4, 16, 64, 128),
        cas_rows=64,
    ),
    Shape(
        "small",
        hidden=128,
        attention=192,
        qkv=256,
        intermediate=384,
        layers=4,
        dtype="float32",
        sizes=(64 * _KIB, _MIB, 4 * _MIB),
        tokens=(1, 8, 32),
        cas_rows=8,
    ),
)

SHAPES = {shape.name: shape for shape in _TABLE}


def default_shape(backend: str, quick: bool) -> str:
    if backend == "host":
        return "small" if quick else "medium"
    return "qwen3-32b"
