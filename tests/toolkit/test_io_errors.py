"""Each system call of each command fails in turn: nothing is lost, and the same command then ends right."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.fakehub.server import LocalHub
from scripts.torture.combinations import World, make_world, scratch
from scripts.torture.io_errors import CASES, Case
from toolkit.hub import retry
from toolkit.io import reader

# Of all calls, errors, passing and lasting ones; a number that shares no factor with them reaches every kind.
EVERY = 37


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=scratch()) as base:
        patch.setenv("HF_ENDPOINT", "")
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            patch.delenv(name, raising=False)
        patch.setattr(retry, "BACKOFF", retry.BACKOFF)
        patch.setattr(reader, "PAUSES", (0.0,) * len(reader.PAUSES))
        hubs: list[LocalHub] = []

        def serve(repos: dict[str, Path]) -> LocalHub:
            hubs.append(LocalHub(repos).__enter__())
            return hubs[0]

        try:
            yield make_world(Path(base), serve)
        finally:
            hubs[0].close()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_system_call_that_fails_loses_nothing(world: World, name: str) -> None:
    case = Case(world, name)
    assert len(case.calls) >= 3
    for injection in list(case.injections())[::EVERY]:
        case.check(*injection)
