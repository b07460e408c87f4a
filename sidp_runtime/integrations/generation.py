"""Greedy generation of one padded batch with a transformers model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers


def prepare(threads: int, seed: int) -> None:
    """Sets up this process for generation: ``threads`` for the arithmetic, ``seed`` for torch's generator."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]


class _EachStep(transformers.StoppingCriteria):
    """Calls back after each step; ends the generation when told to."""

    def __init__(self, on_step: Callable[[int], bool], start: int) -> None:
        self._on_step = on_step
        self._start = start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        stop = self._on_step(input_ids.shape[1] - self._start)
        return torch.full((input_ids.shape[0],), stop, dtype=torch.bool, device=input_ids.device)


def generate_batch(
    model: Any,
    input_ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    pad_token_id: int,
    eos_token_ids: Sequence[int],
    on_step: Callable[[int], bool] | None = None,
) -> tuple[list[list[int]], list[str]]:
    """New token ids of each sequence, its end token included, and why it ended: ``stop`` or ``length``.

    ``model``: a transformers causal LM. Prompts are padded on the left and masked. A sequence that has ended stays in
    the batch until all have, so every step of a batch has the same number of rows in every run. ``on_step(n)`` is
    called after the n-th new token; True breaks off (the reason is then ``length`` where no end token came).
    """
    longest = max(len(ids) for ids in input_ids)
    device = next(model.parameters()).device
    padded = torch.tensor([[pad_token_id] * (longest - len(ids)) + list(ids) for ids in input_ids], device=device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in input_ids], device=device)
    criteria = transformers.StoppingCriteriaList([_EachStep(on_step, longest)] if on_step is not None else [])
    with torch.inference_mode():
        output = model.generate(
            input_ids=padded,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad_token_id,
            eos_token_id=list(eos_token_ids) or None,
            stopping_criteria=criteria,
        )
    ends = set(eos_token_ids)
    sequences, reasons = [], []
    for row in output[:, longest:].tolist():
        end = next((position for position, token in enumerate(row) if token in ends), None)
        sequences.append(row if end is None else row[: end + 1])
        reasons.append("length" if end is None else "stop")
    return sequences, reasons
