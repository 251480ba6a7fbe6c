"""No command destroys or mixes anything, whatever it finds: every state of a directory with every kind of source."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from scripts.torture.combinations import combinations
from scripts.torture.trial import Trial
from scripts.torture.world import World, scratch

pytest_plugins = ("tests.support.world",)

CHUNKS = 16


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_command_on_every_state_with_every_source(world: World, chunk: int) -> None:
    assert len(combinations()) > 2500
    for state, command in combinations()[chunk::CHUNKS]:
        with tempfile.TemporaryDirectory(dir=scratch()) as directory:
            Trial(world, state, Path(directory)).run(command)
