"""Two or three commands one after another, on any state: none destroys or mixes anything."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from scripts.torture.combinations import sequence
from scripts.torture.world import World, scratch

pytest_plugins = ("tests.support.world",)

CHUNKS, SEQUENCES = 4, 120


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_commands_one_after_another(world: World, chunk: int) -> None:
    for seed in range(chunk, SEQUENCES, CHUNKS):
        with tempfile.TemporaryDirectory(dir=scratch()) as directory:
            sequence(world, seed, Path(directory))
