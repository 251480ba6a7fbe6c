"""Stop texts, wherever they begin and end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import runner
from runner.generation.options import Sampling
from runner.generation.stops import ScannedText, StopScanner
from tests.support.commands import run

some_bytes = st.binary(max_size=8).map(lambda data: bytes(byte % 3 for byte in data))


@given(st.lists(some_bytes), st.lists(some_bytes.filter(len), min_size=1, max_size=3))
def test_the_first_stop_text_ends_the_text_however_it_is_cut(pieces: list[bytes], stops: list[bytes]) -> None:
    """What is safe never shrinks, and never reaches into what may become a stop text."""
    scanner, safe, whole = StopScanner(stops), 0, b""
    for piece in pieces:
        whole += piece
        scanner.push(piece)
        assert safe <= scanner.safe <= len(whole)
        safe = scanner.safe
        found = [whole.find(stop) for stop in stops if stop in whole]
        if found:
            assert scanner.end == min(found)
            return
        longest = max(
            (size for stop in stops for size in range(len(stop)) if whole.endswith(stop[:size])), default=0
        )
        assert scanner.end is None and scanner.safe == len(whole) - longest


@given(st.text(max_size=20), st.text(min_size=1, max_size=3), st.integers(1, 4))
def test_the_text_is_given_in_whole_characters(text: str, stop: str, step: int) -> None:
    data = text.encode(errors="replace")
    scanner = StopScanner([stop.encode(errors="replace")])
    stream, shown = ScannedText(scanner), ""
    for start in range(0, len(data), step):
        scanner.push(data[start : start + step])
        shown += stream.push(0)
    shown += stream.finish()
    assert shown == data.decode().split(stop.encode(errors="replace").decode())[0]


def test_every_tokens_bytes_are_what_it_decodes_to(miniature: tuple[Path, Path]) -> None:
    tokenizer = runner.load(miniature[1]).tokenizer
    for token in tokenizer.vocabulary.values():
        data = tokenizer.token_bytes(token)
        assert data.decode(errors="replace") == tokenizer.decode([token])
    assert tokenizer.token_bytes(10**6) == b""


@pytest.mark.parametrize("speculate", ["lookup", "off"])
def test_a_text_ends_before_a_stop_text(miniature: tuple[Path, Path], speculate: str) -> None:
    """Of every part of the text, also ones that begin and end inside of tokens."""
    model, prompt = runner.load(miniature[1]), "SELECT name FROM"
    whole = next(model.generate_all([prompt], max_new_tokens=12))
    text = model.text(whole)
    assert len(text) > 10
    for start in range(0, len(text) - 3, 5):
        stop = text[start : start + 3]
        found = next(
            model.generate_all(
                [prompt], max_new_tokens=12, sampling=Sampling(stop=("nowhere", stop)), speculate=speculate
            )
        )
        assert found.stop_reason == "stop" and model.text(found) == text.split(stop)[0]
        assert found.ids == whole.ids[: len(found.ids)]
        done = run("generate", miniature[1], prompt, "--stop", stop, "--max-new-tokens", "12", "--json")
        assert json.loads(done.stdout)["text"] == text.split(stop)[0]
        shown = run("generate", miniature[1], prompt, "--stop", stop, "--max-new-tokens", "12").stdout
        assert shown == text.split(stop)[0] + "\n"
