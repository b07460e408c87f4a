"""The prompts file: parsed and tokenised whole before anything starts, and cut into fixed batches."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import ConfigError

_KEYS = ("id", "prompt", "messages", "raw")


class Tokenizer(Protocol):
    """What a job needs of a tokenizer (``sidp_runtime.integrations.tokenizer``)."""

    has_chat_template: bool

    def encode(self, text: str) -> list[int]: ...
    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]: ...
    def decode(self, token_ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Prompt:
    """One line of the file: either ``text`` or ``messages`` (role and content)."""

    id: str
    line: int
    text: str | None = None
    messages: tuple[tuple[str, str], ...] = ()
    raw: bool = False


@dataclass(frozen=True)
class Request:
    """A tokenised prompt."""

    id: str
    line: int
    input_ids: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """Requests that go through the model together, padded on the left to the longest."""

    index: int
    requests: tuple[Request, ...]

    @property
    def rows(self) -> int:
        """Rows of its largest step: sequences times padded length."""
        return len(self.requests) * max(len(request.input_ids) for request in self.requests)


def step_rows(batches: Sequence[Batch], most: int = 16) -> list[int]:
    """Row counts of the batches' steps, ascending, the largest last: of the prompts, and of each token that follows.

    At most ``most`` of the prompts' counts are told apart, else they are rounded up to powers of two.
    """
    prompts = {batch.rows for batch in batches}
    if len(prompts) > most:
        prompts = {1 << (rows - 1).bit_length() for rows in prompts}
    return sorted(prompts | {len(batch.requests) for batch in batches})


def read_prompts(path: Path) -> list[Prompt]:
    """Every prompt of a JSON-lines file, in order. ``ConfigError`` names the first line that is wrong, and why.

    Keys: ``id`` (default: the line number), and ``prompt`` or ``messages``; ``raw`` keeps a prompt out of the chat
    template. Other keys are errors, for nothing would be done about them. Empty lines are passed over.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise ConfigError(f"the prompts {path} cannot be read: {error.strerror}") from error
    prompts = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = _parse(line, number)
        except ConfigError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
        if prompt.id in seen:
            raise ConfigError(f"{path}, line {number}: the id {prompt.id!r} is also that of line {seen[prompt.id]}")
        seen[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise ConfigError(f'{path} has no prompts: give one JSON object a line with a "prompt" or "messages"')
    return prompts


def _parse(line: bytes, number: int) -> Prompt:
    try:
        document = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ConfigError(f"not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"a JSON {type(document).__name__}, not an object")
    if unknown := [key for key in document if key not in _KEYS]:
        raise ConfigError(f"unknown key {unknown[0]!r}; known are {', '.join(_KEYS)}")
    if ("prompt" in document) == ("messages" in document):
        raise ConfigError('needs either "prompt" or "messages"')
    raw = document.get("raw", False)
    if not isinstance(raw, bool):
        raise ConfigError(f'"raw" is {raw!r}, not true or false')
    identity = _text(document.get("id", str(number)), '"id"')
    if "prompt" in document:
        return Prompt(identity, number, text=_text(document["prompt"], '"prompt"'), raw=raw)
    if raw:
        raise ConfigError('"raw" goes with "prompt": messages need the chat template')
    return Prompt(identity, number, messages=_messages(document["messages"]))


def _messages(value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise ConfigError('"messages" is not a list with at least one message')
    messages = []
    for position, message in enumerate(value):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise ConfigError(f'message {position} is not an object of "role" and "content"')
        messages.append((_text(message["role"], f"role {position}"), _text(message["content"], f"content {position}")))
    return tuple(messages)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{what} is {value!r}, not a text with at least one character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair
        raise ConfigError(f"{what} is not valid Unicode: {error}") from error
    return value


def tokenise(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, *, max_new_tokens: int, max_length: int | None
) -> list[Request]:
    """Token ids of every prompt. A plain prompt becomes one user message if the tokenizer has a chat template.

    ``max_length``: tokens that the model can take, prompt and answer together. ``ConfigError`` names the line of a
    prompt that does not fit, has no tokens, or has messages although there is no chat template.
    """
    requests = []
    for prompt in prompts:
        where = f"prompts, line {prompt.line} (id {prompt.id!r})"
        try:
            ids = _encode(prompt, tokenizer)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        if not ids:
            raise ConfigError(f"{where}: has no tokens")
        if max_length is not None and len(ids) + max_new_tokens > max_length:
            raise ConfigError(
                f"{where}: {len(ids)} tokens and {max_new_tokens} new ones are more than the model's {max_length}; "
                "shorten it or lower --max-new-tokens"
            )
        requests.append(Request(prompt.id, prompt.line, tuple(ids)))
    return requests


def _encode(prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    if prompt.text is not None and (prompt.raw or not tokenizer.has_chat_template):
        return tokenizer.encode(prompt.text)
    if not tokenizer.has_chat_template:
        raise ConfigError('has "messages", but the tokenizer has no chat template; give a "prompt"')
    messages = prompt.messages if prompt.text is None else (("user", prompt.text),)
    return tokenizer.encode_chat([{"role": role, "content": content} for role, content in messages])


def cut(requests: Sequence[Request], batch_size: int) -> list[Batch]:
    """The requests in file order, ``batch_size`` at a time.

    A batch depends on the file and ``batch_size`` alone, never on replicas, mode, timing or restarts: the row counts of
    the matrix products then are the same in every run, and so is every bit of greedy output.
    """
    return [
        Batch(index, tuple(requests[start : start + batch_size]))
        for index, start in enumerate(range(0, len(requests), batch_size))
    ]


def todo(batches: Sequence[Batch], finished: Collection[str]) -> list[int]:
    """Batches with at least one id that is not finished; such a batch is run again whole."""
    return [batch.index for batch in batches if any(request.id not in finished for request in batch.requests)]
