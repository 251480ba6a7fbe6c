"""A small repository on a local hub, and a client without token, offline mode or waiting.

For `pytest_plugins` of the tests that talk to it; these also use the fixtures `client` and `surroundings`.
"""

from __future__ import annotations

import threading

import pytest

from scripts.fakehub.server import LocalHub, Repo
from tests.support.bloom_repos import (
    BLOOM,
    COMMIT,
    FILE,
    NAME,
    RANGE,
    WINDOW,
    noise,
    write_bin_repo,
    write_pins,
)
from toolkit.hub import ranges, retry
from toolkit.hub import revision as hub


@pytest.fixture(scope="module")
def client():
    import huggingface_hub

    yield
    huggingface_hub.close_session()


@pytest.fixture
def surroundings(tmp_path, monkeypatch):
    """No token, no offline mode, no waiting."""
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(retry, "BACKOFF", (0.0, 0.0, 0.0))


@pytest.fixture
def small_ranges(monkeypatch):
    monkeypatch.setattr(ranges, "WINDOW", WINDOW)
    monkeypatch.setattr(ranges, "SMALLEST", 4096)
    monkeypatch.setattr(ranges, "LARGEST", RANGE)


@pytest.fixture
def no_thread_is_left():
    yield
    assert [thread for thread in threading.enumerate() if thread.name.startswith("range")] == []


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    return write_bin_repo(tmp_path_factory.mktemp("hub") / "repo")


@pytest.fixture
def local(repo, monkeypatch):
    """A hub with the repository under an ordinary name, and as a bigscience/bloom with pins of its own."""
    with LocalHub({NAME: repo, BLOOM: Repo(repo, commit=COMMIT)}) as started:
        monkeypatch.setenv("HF_ENDPOINT", started.endpoint)
        yield started


@pytest.fixture
def pins(repo, tmp_path, monkeypatch):
    write_pins(tmp_path / "pins", repo, BLOOM, COMMIT)
    monkeypatch.setattr(hub, "PINS", tmp_path / "pins")


@pytest.fixture(scope="module")
def single(request, tmp_path_factory):
    """A repository of one file, FILE, with as many bytes as the module's SIZE says."""
    directory = tmp_path_factory.mktemp("single")
    (directory / FILE).write_bytes(noise(FILE, request.module.SIZE))
    return directory


@pytest.fixture
def one(single, monkeypatch):
    """A hub with that repository."""
    with LocalHub({NAME: single}) as started:
        monkeypatch.setenv("HF_ENDPOINT", started.endpoint)
        yield started


@pytest.fixture
def target(tmp_path):
    return tmp_path / "target"
