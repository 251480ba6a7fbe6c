"""Every reader of a file that others made gives a sound result or one clear error for any bytes.

scripts/torture/fuzz.py does the same for any time.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from scripts.torture.mutations import READERS, check

calm = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_any_bytes_give_a_result_or_one_clear_error(name: str, tmp_path: Path) -> None:
    reader, taken = READERS[name], set()
    for shard in ("a.bin", "b.bin"):
        (tmp_path / shard).touch()  # the index names them

    @calm
    @given(data=reader.inputs())
    def run(data: bytes) -> None:
        taken.add(check(reader, tmp_path, data))

    run()
    # Some inputs are damaged, and some reach the end of the reader.
    assert taken == {True, False}
