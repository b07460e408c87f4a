"""Reading a model's weights: headers are validated once, then each rank reads only the bytes it owns.

Peak memory of a loading process: its own layers, the ring, and a few MiB of staging
(``CheckpointSource.peak_staging_bytes``) when a tensor must be converted. Tensors stored in the wanted dtype
are read straight into place; ``ReadAhead`` gives them in memory of their own, for places that cannot be read into.
Nothing is memory-mapped.
"""

from .checkpoint import Checkpoint, TensorEntry
from .gguf_cache import tokenizer_dir
from .loader import LoadReport, Progress, load_layers, load_layers_staged
from .progress import rich_progress
from .read_ahead import ReadAhead
from .source import CheckpointSource

__all__ = [
    "Checkpoint",
    "CheckpointSource",
    "LoadReport",
    "Progress",
    "ReadAhead",
    "TensorEntry",
    "load_layers",
    "load_layers_staged",
    "rich_progress",
    "tokenizer_dir",
]
