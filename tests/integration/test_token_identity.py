"""SmolLM2-135M-Instruct, the demo's prompts: 1 to 4 replicas give the unpooled model's tokens, two in every mode."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.gguf_model import real_model
from helpers.hf import pooled_model, read_messages
from helpers.processes import RankContext, run_ranks

from sidp_runtime.integrations.generation import generate_batch
from sidp_runtime.loading import Checkpoint, tokenizer_dir

BATCH_SIZE = 4
NEW_TOKENS = 4
MODES = ("was", "cas", "auto")
PAGE = 4096

Tokens = list[list[int]]


@pytest.fixture(scope="module")
def batches(repository: Path) -> list[Tokens]:
    """Every prompt's tokens, in file order, cut into batches."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_dir(Checkpoint.open(real_model())))
    prompts = []
    for line in read_messages(repository / "bench" / "prompts.jsonl"):
        messages = line.get("messages") or [{"role": "user", "content": line["prompt"]}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        prompts.append([int(token) for token in ids])
    assert len(prompts) >= 24
    return [prompts[at : at + BATCH_SIZE] for at in range(0, len(prompts), BATCH_SIZE)]


def unpooled(context: RankContext, path: str, batches: list[Tokens]) -> list[Tokens]:
    model = torch.load(path, weights_only=False)
    return [generate_batch(model, batch, NEW_TOKENS, 2, [2])[0] for batch in batches]


@pytest.fixture(scope="module")
def expected(unpooled_real_model: Path, batches: list[Tokens]) -> list[Tokens]:
    (tokens,) = run_ranks(unpooled, 1, path=str(unpooled_real_model), batches=batches, timeout_s=280)
    assert isinstance(tokens, list)
    return tokens


def replica(context: RankContext, batches: list[Tokens], modes: Sequence[str]) -> dict[str, Any]:
    checkpoint, store = Checkpoint.open(real_model()), context.store()
    max_rows = max(len(batch) * max(map(len, batch)) for batch in batches)
    seen: dict[str, Any] = {}
    for mode in modes:
        with pooled_model(context, checkpoint, mode, mode=mode, max_rows=max_rows) as pooled:
            tokens = {}
            while (number := store.add(f"next-{mode}", 1) - 1) < len(batches):  # who is free takes the next
                tokens[number] = generate_batch(pooled.model, batches[number], NEW_TOKENS, 2, [2])[0]
            context.meet(f"{mode}-generated", 200)
            # Pages are shared out among the processes that map them: all must be there while they are counted.
            memory = pooled.memory_report()
            context.meet(f"{mode}-measured", 60)
            largest = max(layer.num_bytes for layer in pooled.pool.layers)
            seen[mode] = {"tokens": tokens, "memory": memory, "stats": pooled.stats(), "largest": largest}
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_tokens_are_those_of_the_unpooled_model(batches: list[Tokens], expected: list[Tokens], world_size: int) -> None:
    # A group of one streams nothing and asks nobody, whatever the mode: one of them will do. More have nothing in auto
    # that two have not.
    modes = {1: MODES[:1], 2: MODES}.get(world_size, MODES[:2])
    if world_size != 2:  # two replicas take them all; one alone, and more of them on few cores, take some
        count = 2 if world_size == 1 else 4
        batches, expected = batches[:count], expected[:count]
    ranks = run_ranks(replica, world_size, batches=batches, modes=modes, timeout_s=290)
    for mode in modes:
        seen = [rank[mode] for rank in ranks]
        tokens = {int(number): batch for rank in seen for number, batch in rank["tokens"].items()}
        assert [tokens[number] for number in range(len(batches))] == expected, mode
        check_use(mode, world_size, [rank["stats"] for rank in seen])
        check_memory(world_size, [rank["memory"] for rank in seen], seen[0]["largest"])


def check_use(mode: str, world_size: int, stats: list[dict[str, Any]]) -> None:
    for counters in stats:
        steps = counters["steps"]
        assert counters["fallbacks"] == counters["steps_broken_off"] == counters["served_failed"] == 0
        if world_size == 1:
            assert steps["was"] == counters["decisions"]["all-local"]
            assert counters["copies"] == 0
        elif mode == "was" and steps["was"]:
            assert sum(counters["bytes_by_peer"]) > 0
        elif mode == "cas" and steps["cas"]:
            assert sum(counters["requests_by_peer"]) > 0
        if world_size > 1 and mode != "auto":
            assert steps["cas" if mode == "was" else "was"] == 0


def check_memory(world_size: int, memory: list[dict[str, int]], largest: int) -> None:
    """The pool occupies its tensors once, and each rank its share rounded up to a layer, plus the ring."""
    pooled = memory[0]["pooled_bytes"]
    occupied = sum(rank["pool_pss"] for rank in memory)
    # The kernel rounds each process's share of a page down to 1 KiB a mapping.
    assert pooled <= occupied + 1024 * world_size**2
    assert occupied <= pooled + PAGE * world_size
    for rank in memory:
        held = rank["own_pool_rss"] + rank["resident_rss"] + rank["ring_rss"]
        assert held <= pooled / world_size + largest + rank["ring_bytes"] + 2 * PAGE
        if world_size > 1:
            assert rank["ring_rss"] == rank["ring_bytes"] == 2 * largest


def peak(context: RankContext) -> dict[str, int]:
    """Growth of the process's peak while it loads, beside what it may hold."""
    checkpoint = Checkpoint.open(real_model())
    torch.ones(8) @ torch.ones(8)  # libraries load before the first reading
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is there now
    before = status("VmHWM")
    with pooled_model(context, checkpoint, "peak", mode="was") as pooled:
        report = pooled.memory_report()
        held = report["owned_bytes"] + report["ring_bytes"] + report["replica_resident_bytes"]
        return {"grown": status("VmHWM") - before, "held": held, "pooled": report["pooled_bytes"]}


def status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def test_no_process_ever_holds_a_full_model() -> None:
    """Peak while loading: what the rank owns, its ring, resident tensors and one tensor."""
    for seen in run_ranks(peak, 4, timeout_s=120):
        one_tensor = 49152 * 576 * 4  # the embedding, the largest
        slack = 96 << 20  # modules that are imported on first use
        assert seen["grown"] <= seen["held"] + one_tensor + slack
        assert seen["held"] < seen["pooled"]
