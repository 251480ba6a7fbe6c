"""Each system call of each command fails in turn: nothing is lost, and the same command then ends right."""

from __future__ import annotations

import pytest

from scripts.torture.io_errors import CASES, Case
from scripts.torture.world import World

pytest_plugins = ("tests.support.world",)

# Of all calls, errors, passing and lasting ones; a number that shares no factor with them reaches every kind.
EVERY = 151


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_system_call_that_fails_loses_nothing(world: World, name: str) -> None:
    case = Case(world, name)
    assert len(case.calls) >= 3
    for injection in list(case.injections())[::EVERY]:
        case.check(*injection)
