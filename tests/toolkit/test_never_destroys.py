"""No command destroys or mixes anything, whatever it finds: every state of a directory with every kind of source."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.fakehub.server import LocalHub
from scripts.torture.combinations import Trial, World, combinations, make_world, scratch, sequence
from toolkit.hub import retry

CHUNKS = 16
SEQUENCES = 320


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=scratch()) as base:
        patch.setenv("HF_ENDPOINT", "")
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            patch.delenv(name, raising=False)
        patch.setattr(retry, "BACKOFF", retry.BACKOFF)
        hubs: list[LocalHub] = []

        def serve(repos: dict[str, Path]) -> LocalHub:
            hubs.append(LocalHub(repos).__enter__())
            return hubs[0]

        try:
            yield make_world(Path(base), serve)
        finally:
            hubs[0].close()


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_command_on_every_state_with_every_source(world: World, chunk: int) -> None:
    assert len(combinations()) > 2500
    for state, command in combinations()[chunk::CHUNKS]:
        with tempfile.TemporaryDirectory(dir=scratch()) as directory:
            Trial(world, state, Path(directory)).run(command)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS // 4))
def test_commands_one_after_another(world: World, chunk: int) -> None:
    for seed in range(chunk, SEQUENCES, CHUNKS // 4):
        with tempfile.TemporaryDirectory(dir=scratch()) as directory:
            sequence(world, seed, Path(directory))
