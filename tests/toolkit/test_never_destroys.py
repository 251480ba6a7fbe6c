"""No command destroys or mixes anything, whatever it finds: states of a directory with each kind of source.

Here are some of all combinations, of every state and every command; `python -m scripts.torture.combinations` tries all.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from scripts.torture.combinations import STATES, combinations, commands
from scripts.torture.trial import Trial
from scripts.torture.world import World, scratch

pytest_plugins = ("tests.support.world",)

# Of all combinations; a number that shares no factor with that of the commands.
EVERY, CHUNKS = 7, 4


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_no_command_on_any_state_loses_anything(world: World, chunk: int) -> None:
    tried = combinations()[::EVERY]
    assert {state for state, _ in tried} == {*STATES} and {each for _, each in tried} == {*commands()}
    for state, command in tried[chunk::CHUNKS]:
        with tempfile.TemporaryDirectory(dir=scratch()) as directory:
            Trial(world, state, Path(directory)).run(command)
