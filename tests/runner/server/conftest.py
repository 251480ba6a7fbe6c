"""The small random model that the server's tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from llguidance import LLMatcher
from starlette.testclient import TestClient

import runner
from runner.generation import grammar_check
from runner.generation.model import Model
from tests.support.serving import GatedModel, client_of


@pytest.fixture(autouse=True)
def no_process_checks_schemas(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only in a slow test."""
    if not request.node.get_closest_marker("slow"):
        in_process = lambda source, _: LLMatcher.validate_grammar(source)  # noqa: E731
        monkeypatch.setattr(grammar_check, "reason_in_time", in_process)


@pytest.fixture(scope="module")
def model(prepared) -> Model:
    return runner.load(prepared()[1])


@pytest.fixture(scope="module")
def client(model: Model) -> Iterator[TestClient]:
    with client_of(model) as client:
        yield client


@pytest.fixture
def gated(model: Model) -> GatedModel:
    """The model, with passes that wait until they are let through."""
    return GatedModel.of(model)
