"""A server on several machines: it answers as one, and ends if it loses one of them while nobody asks."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest

from tests.support.commands import run
from tests.support.ranks import Rank, finish, start

pytestmark = pytest.mark.slow
PROMPT, NEW = "hello there my friend", 8
PATIENCE = 30.0


def address_of(rank: Rank) -> str:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        errors = rank.output.with_suffix(".err")
        if errors.exists() and (found := re.search(r"http://\S+/v1", rank.errors)):
            return found[0]
        time.sleep(0.05)
    raise AssertionError(rank.errors)


def completed(address: str) -> str:
    """The text of a completion, once the model is there."""
    body = json.dumps({"model": "any", "prompt": PROMPT, "max_tokens": NEW, "temperature": 0}).encode()
    request = urllib.request.Request(f"{address}/completions", body, {"Content-Type": "application/json"})
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return json.load(answer)["choices"][0]["text"]
        except urllib.error.HTTPError as error:
            assert error.code == 503 and time.monotonic() < deadline, error.read()
            time.sleep(0.1)


def test_a_server_answers_as_one_machine_and_ends_when_one_is_lost(sliced, tmp_path: Path) -> None:
    whole, slices = sliced((1, 1))
    expected = json.loads(run("generate", whole, PROMPT, "--max-new-tokens", str(NEW), "--json").stdout)[
        "text"
    ]
    ranks = start(
        tmp_path,
        slices,
        lambda number, path: ["serve", path, "--port", "0", "--model-name", "any"],
        BLOOMDESK_PATIENCE="4",
    )
    assert completed(address_of(ranks[0])) == expected
    ranks[1].process.kill()
    assert finish(ranks) == [1, -9]
    assert "the connection with rank 1" in ranks[0].errors
