"""The results file: append-only JSON lines, one prompt each, beside a header that says what the job was.

``<out>.job.json`` is written first. A job that is started again with the same settings goes on where the file ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import ConfigError

_HEADER_FORMAT = 1


@dataclass(frozen=True)
class Result:
    """One line. ``token_ids`` are the new ones, the end token included; ``finish_reason`` is ``stop`` or ``length``."""

    id: str
    text: str
    token_ids: list[int]
    finish_reason: str
    replica: int
    prompt_tokens: int


def header_path(out: Path) -> Path:
    """Where the header of a results file lies."""
    return out.with_name(f"{out.name}.job.json")


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class ResultsWriter:
    """Holds the results file, locked against other jobs, and the ids that are already in it (``finished``).

    ``settings``: what the results depend on, JSON values by name. ``ids``: of the prompts. ``overwrite`` begins anew.
    ``notices`` has what a user should hear of. Raises ``ConfigError`` when another job holds the file, when it was
    written with other settings (the message says which), or has lines that cannot be this job's.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], ids: Collection[str], *, overwrite: bool) -> None:
        self.path = out
        self.notices: list[str] = []
        self._ids = set(ids)
        try:
            self._fd = os.open(out, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConfigError(f"{out} cannot be written: {error.strerror}") from error
        try:
            self._lock()
            if overwrite:
                os.ftruncate(self._fd, 0)
            self.finished = self._open(settings)
        except BaseException:
            self.close()
            raise

    def append(self, results: Sequence[Result]) -> int:
        """Adds the results whose ids are not in the file yet, in one write, and flushes; returns how many."""
        new = [result for result in results if result.id not in self.finished]
        for result in new:
            if result.id not in self._ids:
                raise ConfigError(f"the result {result.id!r} belongs to no prompt of this job")
        data = b"".join(json.dumps(asdict(result), ensure_ascii=False).encode() + b"\n" for result in new)
        end = os.fstat(self._fd).st_size
        try:
            written = 0
            while written < len(data):  # more than one round only when the disk fills up
                written += os.write(self._fd, data[written:])
            os.fsync(self._fd)
        except OSError as error:
            os.ftruncate(self._fd, end)
            raise ConfigError(
                f"{self.path}: {len(data)} bytes cannot be appended: {error.strerror}; the {end} before them are kept, "
                "and the same command goes on from there"
            ) from error
        self.finished.update(result.id for result in new)
        return len(new)

    def close(self) -> None:
        """Lets go of the file and its lock. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> ResultsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another job is writing {self.path}: wait for it, or give another --out") from error

    def _open(self, settings: Mapping[str, Any]) -> set[str]:
        with os.fdopen(os.dup(self._fd), "rb") as stream:
            stream.seek(0)
            data = stream.read()
        if not data:  # nothing to protect, whatever an old header says
            self._write_header(settings)
            return set()
        self._check_header(settings)
        whole = data[: data.rfind(b"\n") + 1]
        finished = self._read(whole)
        if len(whole) < len(data):
            os.ftruncate(self._fd, len(whole))
            self.notices.append(f"{self.path}: cut off {len(data) - len(whole)} bytes of a line that had no end")
        return finished

    def _read(self, data: bytes) -> set[str]:
        finished: dict[str, int] = {}
        hint = "; use --overwrite to begin anew"
        for number, line in enumerate(data.split(b"\n")[:-1], 1):
            where = f"{self.path}, line {number}"
            try:
                identity = json.loads(line)["id"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ConfigError(f"{where} is not a result ({error!r}){hint}") from error
            if not isinstance(identity, str) or identity not in self._ids:
                raise ConfigError(f"{where}: {identity!r} is no id of the prompts file{hint}")
            if identity in finished:
                raise ConfigError(f"{where}: {identity!r} is also that of line {finished[identity]}{hint}")
            finished[identity] = number
        return set(finished)

    def _check_header(self, settings: Mapping[str, Any]) -> None:
        path = header_path(self.path)
        hint = "; give another --out, or --overwrite to begin anew"
        try:
            header = json.loads(path.read_bytes())
            if header["format"] != _HEADER_FORMAT or header["digest"] != digest(header["settings"]):
                raise ValueError("of another version, or changed by hand")
        except FileNotFoundError as error:
            raise ConfigError(
                f"{self.path} has {os.fstat(self._fd).st_size} bytes but no header {path.name}: "
                f"not written by a job{hint}"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is not a job's header ({error}){hint}") from error
        before = header["settings"]
        now = json.loads(json.dumps(dict(settings)))  # as the file would give it back
        differ = [
            f"{name} was {_short(before.get(name))}, is {_short(now.get(name))}"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name)
        ]
        if differ:
            raise ConfigError(f"{self.path} was begun with other settings: {', '.join(differ)}{hint}")

    def _write_header(self, settings: Mapping[str, Any]) -> None:
        header = {"format": _HEADER_FORMAT, "digest": digest(dict(settings)), "settings": dict(settings)}
        write_atomically(header_path(self.path), json.dumps(header, indent=1, sort_keys=True) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """The whole text or nothing, also through a crash. ``ConfigError`` if it cannot be written."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def _short(value: Any) -> str:
    text = json.dumps(value)
    # Digests: enough to see that they differ.
    return text if len(text) <= 40 else f"{text[:16]}..."
