"""A Hugging Face tokenizer as a job uses it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError


class HfTokenizer:
    """Tokenizer of a model directory (``sidp_runtime.loading.tokenizer_dir``).

    Raises ``CheckpointError`` if there is none that transformers can read.
    """

    def __init__(self, directory: str) -> None:
        import transformers

        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory)
        except Exception as error:  # transformers raises what its parsers happen to raise
            raise CheckpointError(f"{directory}: transformers finds no tokenizer in it: {error}") from error
        self._directory = directory
        self.has_chat_template = bool(self._tokenizer.chat_template)

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the model puts around a text."""
        return [int(i) for i in self._tokenizer(text)["input_ids"]]

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a dialogue, up to where the answer begins. ``ConfigError`` if the template refuses it."""
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise on roles or orders that they do not know
            raise ConfigError(f"the chat template refuses the messages: {error}") from error
        # The template has written the special tokens.
        return [int(i) for i in self._tokenizer(text, add_special_tokens=False)["input_ids"]]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def eos_token_ids(self, config: Mapping[str, Any]) -> list[int]:
        """Tokens that end an answer: as ``generation_config.json`` says, else the model's and the tokenizer's."""
        path = Path(self._directory) / "generation_config.json"
        if path.exists():
            try:
                stated = _ids(json.loads(path.read_bytes()).get("eos_token_id"))
            except (OSError, ValueError, AttributeError) as error:
                raise CheckpointError(f"{path} is not a JSON object that can be read: {error}") from error
            if stated:
                return stated
        return sorted({*_ids(config.get("eos_token_id")), *_ids(self._tokenizer.eos_token_id)})

    def pad_token_id(self, eos_token_ids: Sequence[int]) -> int:
        """What fills short prompts; masked, so any token will do."""
        pad = self._tokenizer.pad_token_id
        return int(pad) if pad is not None else (eos_token_ids[0] if eos_token_ids else 0)


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(i) for i in value] if isinstance(value, list) else [int(value)]
