"""Forms of a checkpoint, combined at random: each is what transformers loads, or refused in one sentence."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from scripts.torture.forms import attempt, make_base

CHUNKS, FORMS = 4, 60


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_any_form_is_what_transformers_loads_or_refused(tmp_path: Path, chunk: int) -> None:
    base, small = make_base(tmp_path)
    found = Counter(attempt(seed, tmp_path / str(seed), base, small) for seed in range(chunk, FORMS, CHUNKS))
    assert found["equal"] >= 5 and found["refused"]
