"""Whole jobs on a tiny model, with real replicas: same bits whatever runs them, killed and resumed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import psutil
import pytest

from sidp_runtime.errors import CheckpointError, ConfigError, PeerDeadError, UnsupportedError
from sidp_runtime.job import JobConfig, JobReport, run
from sidp_runtime.job.results import header_path

pytestmark = pytest.mark.timeout(280)

TEXT = "the a cat dog sat on mat log and then it ran away over hill far green blue sun moon"
WORDS = TEXT.split()
NUM_PROMPTS = 14


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of three layers and words for tokens; the head decides by random weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("model")
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<end>", "<unk>", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    ).save_pretrained(path)
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [{"id": f"p{i}", "prompt": " ".join(WORDS[i : i + 2 + i % 5])} for i in range(NUM_PROMPTS)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config(model: Path, prompts: Path, out: Path, replicas: int = 2, **values: Any) -> JobConfig:
    defaults: dict[str, Any] = {"batch_size": 3, "max_new_tokens": 12, "threads_per_replica": 1}
    return JobConfig(model, prompts, out, replicas, **{**defaults, **values})


def answers(path: Path) -> dict[str, list[int]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line["token_ids"] for line in lines}


@pytest.fixture(scope="module")
def alone(model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """What one replica with all of the weights answers."""
    out = tmp_path_factory.mktemp("alone") / "out.jsonl"
    report = run(config(model, prompts, out, replicas=1))
    assert report.ranks[0].kv_bytes_gained == 0
    return answers(out)


def reference(model: Path, prompts: Path) -> dict[str, list[int]]:
    """transformers by itself, one prompt after the other: other row counts, so equal only where nothing is close."""
    import torch
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    found = {}
    for line in prompts.read_text().splitlines():
        prompt = json.loads(line)
        ids = tokenizer(prompt["prompt"], return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            output = network.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=0
            )
        found[prompt["id"]] = output[0, ids.shape[1] :].tolist()
    return found


def test_answers_are_those_of_transformers(alone: dict[str, list[int]], model: Path, prompts: Path) -> None:
    assert alone == reference(model, prompts)
    assert len({tuple(tokens) for tokens in alone.values()}) > NUM_PROMPTS // 2


@pytest.mark.parametrize("mode", ["was", "cas", "auto"])
def test_every_mode_gives_the_same_bits(
    mode: str, alone: dict[str, list[int]], model: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    report = run(config(model, prompts, out, mode=mode, report=tmp_path / "report.json"))
    assert answers(out) == alone
    assert report.new_tokens == sum(map(len, alone.values()))
    for rank in report.ranks:
        assert rank.fate == ""
        assert rank.kv_bytes_gained is not None
        assert rank.full_bytes is not None
        assert 0 < rank.full_bytes - rank.kv_bytes_gained < rank.full_bytes + (rank.ring_bytes or 0)
        assert rank.fallbacks == 0
    if mode == "was":
        assert sum(sum(rank.bytes_by_peer) for rank in report.ranks) > 0
    if mode == "cas":
        sent = sum(sum(rank.requests_by_peer) for rank in report.ranks)
        assert sent == sum(sum(rank.served_by_peer) for rank in report.ranks) > 0
    assert json.loads((tmp_path / "report.json").read_text())["mode"] == mode


@pytest.mark.parametrize("mode", ["was", "cas"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_replica_changes_nothing(
    mode: str, victim: int, alone: dict[str, list[int]], model: Path, prompts: Path, tmp_path: Path
) -> None:
    pids: list[int] = []

    def on_event(name: str, *values: Any) -> None:
        if name == "ready":
            pids.extend(values[0])
        if name == "batch_done" and pids:
            os.kill(pids.pop(victim), signal.SIGKILL)
            pids.clear()

    out = tmp_path / "out.jsonl"
    report = run(config(model, prompts, out, mode=mode), on_event)
    assert answers(out) == alone
    assert report.ranks[victim].fate.startswith("killed by SIGKILL")
    *unhelpful, death = report.warnings  # the first ones are the runtimes' own, of a model that small
    assert sum("sharing saves nothing" in words for words in unhelpful) == 1
    assert "killed by SIGKILL" in death


def left_in_shared_memory() -> list[str]:
    """Names that stay; those of other groups on this machine go within moments."""
    end = time.monotonic() + 5
    left = {path.name for path in Path("/dev/shm").glob("sidp-*")}
    while left and time.monotonic() < end:
        time.sleep(0.05)
        left &= {path.name for path in Path("/dev/shm").glob("sidp-*")}
    return sorted(left)


class Killer:
    """Kills one replica of a job at a moment after an event, whatever it is doing then."""

    def __init__(self, event: str, moment_s: float, victim: int) -> None:
        self.killed: int | None = None
        self._event = event
        self._moment_s = moment_s
        self._victim = victim
        self._thread = threading.Thread(target=self._kill)

    def on_event(self, name: str, *values: Any) -> None:
        if name == self._event and self._thread.ident is None:
            self._thread.start()

    def _kill(self) -> None:
        time.sleep(self._moment_s)
        pids = sorted(child.pid for child in psutil.Process(forkserver._forkserver._forkserver_pid).children())
        if pids:
            os.kill(pids[self._victim % len(pids)], signal.SIGKILL)
            self.killed = pids[self._victim % len(pids)]

    def join(self) -> None:
        self._thread.join()


@pytest.mark.timeout(600)
def test_killed_at_twenty_random_moments(
    alone: dict[str, list[int]], model: Path, prompts: Path, tmp_path: Path
) -> None:
    """During start-up, work and close-down: no prompt is lost or answered twice, nothing hangs or is left behind."""
    choose = random.Random(20)
    whole = run(config(model, prompts, tmp_path / "whole.jsonl", mode="was"))
    whole_s = whole.start_s + whole.work_s
    # by turns, as one of the two may take most of the time
    phases = [("starting", whole.start_s), ("ready", whole.work_s)]
    fates = {"restarted": 0, "went on": 0, "too late": 0}
    for attempt in range(50):
        event, length_s = phases[attempt % 2]
        killer = Killer(event, choose.uniform(0, length_s), choose.randrange(3))
        out, replicas = tmp_path / f"{attempt}.jsonl", choose.choice((2, 3))
        begin = time.monotonic()
        report = run(config(model, prompts, out, replicas, mode=choose.choice(("was", "cas"))), killer.on_event)
        killer.join()
        assert answers(out) == alone, f"attempt {attempt}"
        assert time.monotonic() - begin < 3 * whole_s + 20, f"attempt {attempt} took long"
        assert not left_in_shared_memory(), f"attempt {attempt} left shared memory"
        if killer.killed is None:
            continue
        assert not psutil.pid_exists(killer.killed)
        died = any(rank.fate for rank in report.ranks)
        fates["restarted" if report.restarts else "went on" if died else "too late"] += 1
        if fates["restarted"] + fates["went on"] == 20:
            break
    assert fates["restarted"] + fates["went on"] == 20, fates
    assert min(fates["restarted"], fates["went on"]) >= 5, f"the moments were not spread: {fates}"


def test_all_killed_then_resumed_with_other_replicas_and_mode(
    alone: dict[str, list[int]], model: Path, prompts: Path, tmp_path: Path
) -> None:
    pids: list[int] = []

    def on_event(name: str, *values: Any) -> None:
        if name == "ready":
            pids.extend(values[0])
        if name == "batch_done":
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            pids.clear()

    out = tmp_path / "out.jsonl"
    with pytest.raises(PeerDeadError, match="no replica is left of 2"):
        run(config(model, prompts, out, mode="was"), on_event)
    before = out.read_bytes()
    assert 0 < len(answers(out)) < NUM_PROMPTS
    out.write_bytes(before[:-5])  # as if the machine had gone down in the middle of a line
    report = run(config(model, prompts, out, replicas=1))
    assert answers(out) == alone
    assert out.read_bytes().startswith(before[: before[:-5].rfind(b"\n") + 1])
    assert report.prompts_skipped == before.count(b"\n") - 1
    again: list[str] = []
    report = run(config(model, prompts, out), lambda name, *values: again.append(name))
    assert (report.prompts_skipped, report.ranks) == (NUM_PROMPTS, [])
    assert "starting" not in again


def test_other_settings_are_refused_before_anything_starts(model: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run(config(model, prompts, out, replicas=1, max_new_tokens=2))
    events: list[str] = []
    with pytest.raises(ConfigError, match="max_new_tokens was 2, is 3"):
        run(config(model, prompts, out, max_new_tokens=3), lambda name, *values: events.append(name))
    assert events == []
    found: JobReport = run(config(model, prompts, out, replicas=1, max_new_tokens=3, overwrite=True))
    assert (found.prompts_skipped, found.new_tokens) == (0, sum(map(len, answers(out).values())))


def test_a_prompt_longer_than_the_model(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "cat " * 60}))
    with pytest.raises(ConfigError, match=r"line 1 .* 60 tokens and 12 new ones are more than the model's 64"):
        run(config(model, prompts, tmp_path / "out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()


def test_messages_without_a_chat_template(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"messages": [{"role": "user", "content": "cat"}]}))
    with pytest.raises(ConfigError, match="no chat template"):
        run(config(model, prompts, tmp_path / "out.jsonl"))


def test_a_model_without_a_tokenizer(model: Path, prompts: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("model.safetensors", "config.json"):
        (bare / name).symlink_to(model / name)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        run(config(bare, prompts, tmp_path / "out.jsonl"))


def test_a_model_family_that_is_not_supported(model: Path, prompts: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in model.iterdir():
        if file.name != "config.json":
            (other / file.name).symlink_to(file)
    (other / "config.json").write_text((model / "config.json").read_text().replace('"llama"', '"gemma"'))
    with pytest.raises(UnsupportedError, match=r"replica \d reports: model type 'gemma' is not supported"):
        run(config(other, prompts, tmp_path / "out.jsonl"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_stops_and_goes_on(
    number: signal.Signals, code: int, alone: dict[str, list[int]], model: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    command = [
        sys.executable,
        "-m",
        "sidp_runtime.cli",
        "generate",
        "--model",
        model,
        "--prompts",
        prompts,
        "--out",
        out,
    ]
    more = "--replicas 2 --batch-size 3 --max-new-tokens 12 --threads-per-replica 1"
    command += more.split()
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        limit = time.monotonic() + 120
        while not header_path(out).exists() or not out.read_bytes():
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.005)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the job was done before the signal came")
    assert process.returncode == code, errors
    # before it replicas may have warned that so small a model gains nothing
    assert errors.splitlines()[-1].startswith(f"error: stopped by {number.name}"), errors
    assert "Traceback" not in errors
    run(config(model, prompts, out))
    assert answers(out) == alone
