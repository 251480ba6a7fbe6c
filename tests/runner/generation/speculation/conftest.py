"""Policies and clocks that let drafts propose as much as they can."""

from __future__ import annotations

import pytest

import runner.generation.speculation.draft_model
from runner.generation.speculation.cost import CostModel
from runner.generation.speculation.policy import AcceptanceRate, SpeculationPolicy


class QuickCost(CostModel):
    """The cost of a draft model that takes no time."""

    def learn(self, *_: object, **__: object) -> None:
        self.first_row = 1e-6


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows cost nothing, as if the disk were slow, and drafting hardly anything."""

    def learn(self: CostModel, *_: object, **__: object) -> None:
        self.disk_seconds, self.first_row = 1.0, 0.01

    monkeypatch.setattr(CostModel, "learn", learn)
    monkeypatch.setattr(runner.generation.speculation.draft_model, "CostModel", QuickCost)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft model is never given up, and always used."""
    monkeypatch.setattr(SpeculationPolicy, "draft_is_useless", lambda self, *_: False)
    monkeypatch.setattr("runner.generation.speculation.policy.FIRST_LIMIT", 1e9)
    monkeypatch.setattr("runner.generation.speculation.policy.LARGEST_LIMIT", 1e9)
    monkeypatch.setattr(AcceptanceRate, "rate", 0.5)
