"""The sources and states on which every command is tried, for `pytest_plugins` of the tests that do."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from scripts.fakehub.server import LocalHub
from scripts.torture.world import World, make_world, scratch
from toolkit.hub import retry
from toolkit.io import reader


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """With a hub on loopback; nothing waits before it tries again."""
    with pytest.MonkeyPatch.context() as patch, ExitStack() as opened:
        base = opened.enter_context(tempfile.TemporaryDirectory(dir=scratch()))
        patch.setenv("HF_ENDPOINT", "")
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            patch.delenv(name, raising=False)
        patch.setattr(retry, "BACKOFF", retry.BACKOFF)
        patch.setattr(reader, "PAUSES", (0.0,) * len(reader.PAUSES))
        yield make_world(Path(base), lambda repos: opened.enter_context(LocalHub(repos)))
