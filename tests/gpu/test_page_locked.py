"""A checkpoint's weights for vLLM by way of page-locked memory."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.processes import RankContext, run_ranks
from helpers.stored_model import check_layers

from sidp_runtime.integrations.vllm import weights


def through_page_locked_memory(context: RankContext, folder: str) -> int:
    found = torch.from_numpy(weights._page_locked(100))
    assert found.is_pinned()
    assert not torch.from_numpy(weights._page_locked(weights._MOST_LOCKED_BYTES + 1)).is_pinned()
    del found
    check_layers(Path(folder), "cuda", [1, 3])
    return int(torch.cuda.host_memory_stats()["allocated_bytes.current"])


def test_page_locked_memory_carries_the_bytes_and_is_given_back(tmp_path: Path) -> None:
    assert run_ranks(through_page_locked_memory, 1, folder=str(tmp_path)) == [0]
