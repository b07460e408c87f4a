"""What is to be generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError


@dataclass(frozen=True)
class Workload:
    """Requests of ``prompt_tokens`` tokens in and ``output_tokens`` out.

    ``prompts``: how many of them all replicas have to do together, with a tail in which fewer and fewer run. None: an
    endless queue, which has none.
    """

    prompt_tokens: int
    output_tokens: int
    prompts: int | None = None

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            raise ConfigError(
                f"workload is {self.prompt_tokens} tokens in and {self.output_tokens} out; both must be at least 1"
            )
        if self.prompts is not None and self.prompts < 1:
            raise ConfigError(f"workload has {self.prompts} prompts; it must have at least 1")

    @property
    def context(self) -> int:
        """Tokens of a finished sequence."""
        return self.prompt_tokens + self.output_tokens

    @classmethod
    def parse(cls, text: str) -> Workload:
        """From ``in=2048,out=512`` or ``in=2048,out=512,prompts=400``."""
        try:
            parts = dict(part.split("=") for part in text.replace(" ", "").split(","))
            if set(parts) - {"prompts"} != {"in", "out"}:
                raise ValueError
            prompts = int(parts["prompts"]) if "prompts" in parts else None
            return cls(int(parts["in"]), int(parts["out"]), prompts)
        except ConfigError:
            raise
        except ValueError:
            raise ConfigError(
                f"workload {text!r} is not of the form in=2048,out=512 or in=2048,out=512,prompts=400"
            ) from None

    @classmethod
    def mean(cls, parts: Sequence[Workload]) -> Workload:
        """One like all of ``parts`` together; of several each must say how many ``prompts`` it has."""
        if len(parts) == 1:
            return parts[0]
        counts = [part.prompts or 0 for part in parts]
        if not all(counts):
            raise ConfigError(f"of {len(parts)} workloads together each must have prompts=; {counts.count(0)} have not")
        tokens_in, tokens_out = (
            round(sum(n * tokens for n, tokens in zip(counts, side, strict=True)) / sum(counts))
            for side in ([p.prompt_tokens for p in parts], [p.output_tokens for p in parts])
        )
        return cls(tokens_in, tokens_out, sum(counts))
