"""Progress of a load on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .loader import Progress


@contextmanager
def rich_progress(description: str) -> Iterator[Progress]:
    """A callable for ``load_layers(progress=...)`` that shows bytes done, bytes in all and bytes per second.

    Nothing is drawn when the output is not a terminal except the final line, as ``rich`` does it.
    """
    from rich.filesize import decimal
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns) as bar:
        task = bar.add_task(description, total=None, rate="")

        def report(bytes_done: int, bytes_total: int, bytes_per_s: float) -> None:
            rate = f"{decimal(int(bytes_per_s))}/s"
            bar.update(task, completed=bytes_done, total=bytes_total, rate=rate)

        yield report
