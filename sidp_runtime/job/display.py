"""A job's events on a terminal: loading, prompts done, tokens per second, warnings."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Display:
    """Pass it as ``on_event`` and use it as a context manager. Draws bars only when ``console`` is a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        self._progress = Progress(
            *columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal
        )
        self._loading: TaskID | None = None
        self._prompts: TaskID | None = None
        self._ready = 0.0

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, name: str, *values: Any) -> None:
        handler = getattr(self, f"_on_{name}", None)
        if handler is not None:
            handler(*values)

    def _on_notice(self, text: str) -> None:
        self._console.print(escape(text), highlight=False, soft_wrap=True)

    def _on_warning(self, text: str) -> None:
        self._console.print(f"[yellow]warning:[/] {escape(text)}", highlight=False, soft_wrap=True)

    def _on_planned(self, total: int, finished: int) -> None:
        self._prompts = self._progress.add_task("prompts", total=total, completed=finished, rate="")

    def _on_starting(self, attempt: int) -> None:
        self._on_ready([])
        self._loading = self._progress.add_task("loading, MiB", total=None, rate="")

    def _on_loading(self, done: int, total: int) -> None:
        if self._loading is not None:
            self._progress.update(self._loading, completed=done >> 20, total=total >> 20)

    def _on_ready(self, pids: list[int]) -> None:
        if self._loading is not None:
            self._progress.remove_task(self._loading)
            self._loading = None
        self._ready = time.monotonic()

    def _on_progress(self, finished: int, tokens: int) -> None:
        if self._prompts is not None:
            rate = tokens / max(time.monotonic() - self._ready, 1e-9)
            self._progress.update(self._prompts, completed=finished, rate=f"{rate:.1f} tokens/s")
