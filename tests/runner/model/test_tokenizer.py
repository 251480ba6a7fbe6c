"""Text to ids and back, and text that grows without ever cutting a character in half."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from runner import BloomdeskError
from runner.model.tokenizer import Tokenizer
from scripts.fakehub.checkpoint import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(byte_tokenizer(512)["tokenizer.json"])
    return Tokenizer(path)


@given(text=st.text(max_size=40).filter(lambda text: not re.search("<(unk|s|/s|pad)>", text)))
@settings(deadline=None, max_examples=100)
def test_text_survives(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text(alphabet="aé房ไ🌸 \n", max_size=20))
@settings(deadline=None, max_examples=100)
def test_growing_text_never_cuts_a_character(tokenizer: Tokenizer, text: str) -> None:
    stream = tokenizer.stream()
    chunks = [stream.push(token) for token in tokenizer.encode(text)]
    assert all("�" not in chunk for chunk in chunks)
    assert "".join(chunks) == text
    assert stream.finish() == ""


@given(ids=st.lists(st.integers(0, 259), max_size=30))
@settings(deadline=None, max_examples=200)
def test_growing_text_ends_as_the_whole_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Any ids, also bytes that are no characters, and special tokens in between."""
    stream = tokenizer.stream()
    chunks = [stream.push(token) for token in ids]
    assert "".join(chunks) + stream.finish() == tokenizer.decode(ids)


def test_a_character_is_held_until_it_is_whole(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    assert [stream.push(token) for token in tokenizer.encode("房x")] == ["", "", "房", "x"]


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    assert "".join(stream.push(token) for token in tokenizer.encode("a房")[:-1]) == "a"
    assert stream.finish() == "�"


def test_special_tokens_are_found_in_the_prompt_and_not_shown(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("fox</s>")
    assert ids[-1] == 2
    assert tokenizer.decode(ids) == "fox"


def test_a_post_processor_adds_what_it_adds_for_transformers(tmp_path: Path) -> None:
    files = byte_tokenizer(512)
    body = json.loads(files["tokenizer.json"])
    one = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    body["post_processor"] = {
        "type": "TemplateProcessing",
        "single": one,
        "pair": one,
        "special_tokens": special,
    }
    for name, data in {**files, "tokenizer.json": json.dumps(body).encode()}.items():
        (tmp_path / name).write_bytes(data)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in ("fox", "", "a</s>b"):
        assert Tokenizer(tmp_path / "tokenizer.json").encode(text) == theirs(text).input_ids


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(BloomdeskError, match=r"tokenizer\.json is missing"):
        Tokenizer(path)
    path.write_text("{}")
    with pytest.raises(BloomdeskError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer(path)
