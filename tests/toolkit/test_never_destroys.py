"""No command destroys or mixes anything, whatever it finds: states of a directory with kinds of source."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest

from scripts.torture.combinations import combinations, commands
from scripts.torture.trial import Trial
from scripts.torture.world import World, scratch

pytest_plugins = ("tests.support.world",)

CHUNKS = 4
# Of all combinations; a number that shares no factor with that of the commands reaches each of them, on many states.
EVERY = 5


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_command_on_states_with_every_source(world: World, chunk: int) -> None:
    assert len(combinations()) > 5000 and math.gcd(len(list(commands())), EVERY) == 1
    for state, command in combinations()[::EVERY][chunk::CHUNKS]:
        with tempfile.TemporaryDirectory(dir=scratch()) as directory:
            Trial(world, state, Path(directory)).run(command)
