"""A file of results: what was done stays done, a torn line is done again, and other people's files are left alone."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from runner import BloomdeskError
from runner.cli.prompts import Prompt
from runner.cli.results import Results

PROMPTS = (Prompt(0, 1, "one"), Prompt(1, 2, "two", "b"), Prompt(2, 3, "drei \u2028 ß\n"))


def result(prompt: Prompt) -> dict[str, object]:
    named = {} if prompt.id is None else {"id": prompt.id}
    return {**named, "prompt": prompt.text, "token_ids": [1, 2], "text": "änd"}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "out.jsonl"
    with Results(path, PROMPTS) as results:
        assert results.done == {}
        for index in (2, 0, 1):
            results.append(index, result(PROMPTS[index]))
    return path


def test_results_are_known_again(whole: Path) -> None:
    lines = whole.read_bytes().split(b"\n")
    assert [json.loads(line)["index"] for line in lines[:-1]] == [2, 0, 1] and lines[-1] == b""
    with Results(whole, PROMPTS) as results:
        assert set(results.done) == {0, 1, 2}
    moved = (PROMPTS[0], Prompt(1, 2, "new"), PROMPTS[2], Prompt(3, 9, "two", "b"))
    with Results(whole, moved) as results:  # an id is found wherever it is
        assert set(results.done) == {0, 2, 3}


def test_a_line_torn_anywhere_is_done_again(whole: Path) -> None:
    data = whole.read_bytes()
    for end in range(len(data)):
        whole.write_bytes(data[:end])
        with Results(whole, PROMPTS) as results:
            kept = data[:end].count(b"\n")
            assert set(results.done) == {2, 0, 1} if kept == 3 else len(results.done) == kept
            assert whole.read_bytes() == data[: data[:end].rfind(b"\n") + 1]
            for index in {0, 1, 2} - results.done.keys():
                results.append(index, result(PROMPTS[index]))
        assert sorted(whole.read_bytes().split(b"\n")) == sorted(data.split(b"\n"))


def test_zeros_after_a_power_cut_are_removed(whole: Path) -> None:
    data = whole.read_bytes()
    whole.write_bytes(data + b"\0" * 300)
    with Results(whole, PROMPTS) as results:
        assert set(results.done) == {0, 1, 2}
    assert whole.read_bytes() == data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a diary without an end", "line 1: it does not end like a file of results"),
        (b"a diary\n", "line 1: it is not a result"),
        (b'{"index": 0}\n', "line 1: it is not a result"),
        (b'{"index": [], "prompt": "one"}\n', "line 1: it is not a result"),
        (b'{"index": 0, "id": {}, "prompt": "one"}\n', "line 1: it is not a result"),
        (b"[" * 100_000 + b"\n", "line 1: it is not a result"),
        (b"\xff\n", "line 1: it is not a result"),
        (b'{"index": 9, "prompt": "one"}\n', "there is no prompt with the index 9"),
        (b'{"index": 1, "id": "c", "prompt": "two"}\n', "there is no prompt with the id 'c'"),
        (b'{"index": 0, "prompt": "two"}\n', "the prompt is 'two', that with the index 0 'one'"),
    ],
)
def test_other_files_are_left_alone(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(data)
    with pytest.raises(BloomdeskError, match="does not hold results of these prompts") as raised:
        Results(path, PROMPTS)
    assert message in raised.value.message
    assert path.read_bytes() == data


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BloomdeskError, match="cannot be opened: No such file"):
        Results(tmp_path / "none" / "out.jsonl", PROMPTS)
    with pytest.raises(BloomdeskError, match="cannot be opened: Is a directory"):
        Results(tmp_path, PROMPTS)


def test_a_full_disk_is_one_sentence(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Results(whole, PROMPTS) as results:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(BloomdeskError, match="cannot be written: the disk is full") as raised:
            results.append(0, result(PROMPTS[0]))
    assert "it resumes" in raised.value.hint


def test_each_result_is_on_the_disk_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, sizes, fsync = tmp_path / "out.jsonl", [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (sizes.append(path.stat().st_size), fsync(fd)))
    with Results(path, PROMPTS) as results:
        for prompt in PROMPTS:
            results.append(prompt.index, result(prompt))
            assert sizes[-1] == path.stat().st_size
    assert len(sizes) == 4  # and once for the file's name
