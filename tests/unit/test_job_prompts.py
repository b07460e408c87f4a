"""The prompts file: every wrong line is named before anything starts, and batches depend on the file alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidp_runtime.errors import ConfigError
from sidp_runtime.job.prompts import Batch, Prompt, Request, cut, read_prompts, step_rows, todo, tokenise

pytestmark = pytest.mark.unit


class LetterTokenizer:
    """One token a character; the chat template is visible in the ids."""

    def __init__(self, has_chat_template: bool = True) -> None:
        self.has_chat_template = has_chat_template

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text.strip()]

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        if messages[0]["role"] == "assistant":
            raise ConfigError("the chat template refuses the messages: roles")
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>")

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))


def written(tmp_path: Path, *lines: object) -> Path:
    path = tmp_path / "prompts.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n")
    return path


def test_every_kind_of_line(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {"prompt": "a"},
        "",
        {"id": "x", "prompt": "b", "raw": True},
        {"id": "y", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
    )
    prompts = read_prompts(path)
    assert prompts == [
        Prompt("1", 1, text="a"),
        Prompt("x", 3, text="b", raw=True),
        Prompt("y", 4, messages=(("system", "s"), ("user", "u"))),
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "a JSON list, not an object"),
        ('"text"', "a JSON str"),
        ('{"promt": "a"}', "unknown key 'promt'"),
        ("{}", 'needs either "prompt" or "messages"'),
        ('{"prompt": "a", "messages": []}', 'needs either "prompt" or "messages"'),
        ('{"prompt": ""}', "not a text"),
        ('{"prompt": 3}', '"prompt" is 3'),
        ('{"prompt": "\\ud800"}', "not valid Unicode"),
        ('{"id": 7, "prompt": "a"}', '"id" is 7'),
        ('{"id": "", "prompt": "a"}', '"id" is'),
        ('{"prompt": "a", "raw": 1}', '"raw" is 1'),
        ('{"messages": []}', "at least one message"),
        ('{"messages": {"role": "user"}}', "at least one message"),
        ('{"messages": [{"role": "user"}]}', "message 0"),
        ('{"messages": [{"role": "user", "content": "a", "name": "b"}]}', "message 0"),
        ('{"messages": [{"role": "user", "content": ""}]}', "content 0"),
        ('{"messages": [{"role": "user", "content": "a"}], "raw": true}', '"raw" goes with "prompt"'),
        ('{"id": "first", "prompt": "a"}', "also that of line 1"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    path = written(tmp_path, {"id": "first", "prompt": "a"}, line)
    with pytest.raises(ConfigError, match="line 2: ") as caught:
        read_prompts(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_line_number_can_collide_with_an_id(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"line 2: the id '2' is also that of line 1"):
        read_prompts(written(tmp_path, {"id": "2", "prompt": "a"}, {"prompt": "b"}))


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(ConfigError, match="line 2: not JSON"):
        read_prompts(path)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match="has no prompts"):
        read_prompts(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_prompts(tmp_path / "absent.jsonl")


def ids_of(prompt: Prompt, tokenizer: LetterTokenizer) -> str:
    (request,) = tokenise([prompt], tokenizer, max_new_tokens=1, max_length=None)
    return tokenizer.decode(request.input_ids)


def test_chat_template_is_used_unless_raw_or_absent() -> None:
    assert ids_of(Prompt("1", 1, text="hi"), LetterTokenizer()) == "<user>hi<assistant>"
    assert ids_of(Prompt("1", 1, text="hi", raw=True), LetterTokenizer()) == "hi"
    assert ids_of(Prompt("1", 1, text="hi"), LetterTokenizer(has_chat_template=False)) == "hi"
    dialogue = Prompt("1", 1, messages=(("system", "s"), ("user", "u")))
    assert ids_of(dialogue, LetterTokenizer()) == "<system>s<user>u<assistant>"


@pytest.mark.parametrize(
    ("prompt", "tokenizer", "words"),
    [
        (Prompt("x", 9, messages=(("user", "u"),)), LetterTokenizer(False), "no chat template"),
        (Prompt("x", 9, messages=(("assistant", "u"),)), LetterTokenizer(), "template refuses"),
        (Prompt("x", 9, text="  ", raw=True), LetterTokenizer(), "has no tokens"),
        (Prompt("x", 9, text="abcdef", raw=True), LetterTokenizer(), "6 tokens and 5 new ones are more than"),
    ],
)
def test_a_prompt_that_cannot_be_run_is_named(prompt: Prompt, tokenizer: LetterTokenizer, words: str) -> None:
    with pytest.raises(ConfigError, match=r"line 9 \(id 'x'\)") as caught:
        tokenise([prompt], tokenizer, max_new_tokens=5, max_length=10)
    assert words in str(caught.value)


def requests_of(lengths: list[int]) -> list[Request]:
    return [Request(f"r{i}", i + 1, tuple(range(length))) for i, length in enumerate(lengths)]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 7), st.data())
def test_batches_follow_the_file_and_never_what_is_finished(lengths: list[int], size: int, data: st.DataObject) -> None:
    requests = requests_of(lengths)
    batches = cut(requests, size)
    assert [r for batch in batches for r in batch.requests] == requests
    assert [batch.index for batch in batches] == list(range(len(batches)))
    assert all(len(batch.requests) == size for batch in batches[:-1])
    assert all(b.rows == len(b.requests) * max(len(r.input_ids) for r in b.requests) for b in batches)
    finished = data.draw(st.sets(st.sampled_from([r.id for r in requests])))
    left = todo(batches, finished)
    assert {r.id for r in requests} - finished <= {r.id for index in left for r in batches[index].requests}
    assert all({r.id for r in batches[index].requests} - finished for index in left)


def test_step_rows_are_those_of_prompts_and_of_single_tokens() -> None:
    batches = [Batch(0, (request(5), request(7))), Batch(1, (request(3),))]
    assert step_rows(batches) == [1, 2, 3, 14]
    many = [Batch(i, (request(i + 1),)) for i in range(20)]
    assert step_rows(many) == [1, 2, 4, 8, 16, 32]
    assert step_rows(many, most=20) == list(range(1, 21))


def request(tokens: int) -> Request:
    return Request("x", 1, tuple(range(tokens)))
