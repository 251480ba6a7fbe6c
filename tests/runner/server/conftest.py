"""x"""

from __future__ import annotations

import pytest

import runner
from runner.generation.model import Model


@pytest.fixture(scope="module")
def model(prepared) -> Model:
    return runner.load(prepared()[1])
