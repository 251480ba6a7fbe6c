"""Files of prompts, good and hostile."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner import BloomdeskError
from runner.cli import prompts
from runner.cli.prompts import Prompt, read_prompts


def written(directory: Path, name: str, data: bytes) -> Path:
    path = directory / name
    path.write_bytes(data)
    return path


def test_lines_of_text(tmp_path: Path) -> None:
    path = written(
        tmp_path, "a.txt", '\ufeffone\r\n\n  two \n \t\nthree\u2028four\x0bfive\n{"prompt": 1}'.encode()
    )
    assert read_prompts(path) == (
        Prompt(0, 1, "one"), Prompt(1, 3, "  two "), Prompt(2, 5, "three\u2028four\x0bfive"),
        Prompt(3, 6, '{"prompt": 1}'),
    )  # fmt: skip


def test_lines_of_json(tmp_path: Path) -> None:
    lines = [
        {"prompt": "one", "kind": "left alone"},
        {"prompt": "two\nlines", "id": "b", "max_new_tokens": 3},
        {"id": 7, "prompt": "one"},
    ]
    path = written(tmp_path, "a.jsonl", b"\n\n".join(json.dumps(line).encode() for line in lines))
    assert read_prompts(path) == (
        Prompt(0, 1, "one"), Prompt(1, 3, "two\nlines", "b", 3), Prompt(2, 5, "one", 7),
    )  # fmt: skip
    assert [prompt.key for prompt in read_prompts(path)] == [("index", 0), ("id", "b"), ("id", 7)]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"one", "must end in .txt or .jsonl"),
        ("a.txt", b"", "holds no prompt"),
        ("a.txt", b"\n \n", "holds no prompt"),
        ("a.txt", b"one\n\xff\xfe\n", "line 2: not valid UTF-8"),
        ("a.txt", b"\xed\xa0\x80", "line 1: not valid UTF-8"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "b"', "line 2: not valid JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1: not valid JSON"),
        ("a.jsonl", b'["prompt"]', 'expected an object with a text as its "prompt"'),
        ("a.jsonl", b'{"prompt": null}', 'expected an object with a text as its "prompt"'),
        ("a.jsonl", b'{"text": "a"}', 'expected an object with a text as its "prompt"'),
        ("a.jsonl", b'{"prompt": "a", "id": 1.5}', 'an "id" is a text or a whole number'),
        ("a.jsonl", b'{"prompt": "a", "id": true}', 'an "id" is a text or a whole number'),
        (
            "a.jsonl",
            b'{"prompt": "a", "max_new_tokens": 0}',
            '"max_new_tokens" is a whole number of at least 1',
        ),
        ("a.jsonl", b'{"prompt": "a", "max_new_tokens": "9"}', '"max_new_tokens" is a whole number'),
        ("a.jsonl", b'{"prompt": "a", "max_new_tokens": true}', '"max_new_tokens" is a whole number'),
        (
            "a.jsonl",
            b'{"prompt": "a", "id": 1}\n\n{"prompt": "b", "id": 1}',
            "line 3: the id 1 is that of line 1",
        ),
        ("a.jsonl", b'{"prompt": "a", "prompt": "b"}', 'line 1: "prompt" is there twice'),
        ("a.jsonl", b'{"prompt": "a", "logit_bias": {"5": 1, "05": 2}}', "two logit biases of token id 5"),
        ("a.jsonl", b'{"prompt": "a", "logit_bias": {"5": "1"}}', "maps token ids to numbers"),
        ("a.jsonl", b'{"prompt": "a", "logit_bias": {"5": 1' + b"0" * 400 + b"}}", "from -1e12 to 1e12"),
        ("a.jsonl", b'{"prompt": "a", "temperature": 1' + b"0" * 400 + b"}", "line 1: the temperature must"),
        (
            "a.jsonl",
            b'{"prompt": "a", "temperature": 1, "top_p": 1' + b"0" * 400 + b"}",
            "line 1: top_p must",
        ),
        ("a.jsonl", b'{"prompt": "a", "stop": "\\ud800"}', "line 1: a stop text is not valid UTF-8"),
        ("a.jsonl", b'{"prompt": "a", "regex": "\\ud800"}', "line 1: a constraint is not valid UTF-8"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(BloomdeskError) as raised:
        read_prompts(written(tmp_path, name, data))
    assert message in raised.value.message and len(raised.value.message) < 400


def test_a_line_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "LONGEST_LINE", 1000)
    assert read_prompts(written(tmp_path, "a.txt", b"x" * 999 + b"\n" + b"y" * 1000))
    with pytest.raises(BloomdeskError, match="line 2: longer than 1,000 bytes"):
        read_prompts(written(tmp_path, "a.txt", b"x\n" + b"y" * 10_000))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BloomdeskError, match="is missing"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "directory.txt").mkdir()
    with pytest.raises(BloomdeskError, match="cannot be read"):
        read_prompts(tmp_path / "directory.txt")


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=60), st.sampled_from(["a.txt", "a.jsonl"]))
def test_any_bytes_are_prompts_or_a_clear_error(tmp_path_factory, data: bytes, name: str) -> None:
    path = written(tmp_path_factory.getbasetemp(), name, data)
    with contextlib.suppress(BloomdeskError):
        assert all(prompt.text.strip() or name == "a.jsonl" for prompt in read_prompts(path))
