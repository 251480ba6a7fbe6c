"""A disk that fills up in the middle of a command: a short run of scripts/torture/full_disk.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.torture.full_disk import OTHER_FULL, PAGE, NotAllowed, cases, disk, hub, refused, trial

SHAPE = {"hidden_size": 64, "heads": 8, "blocks": 3, "vocab_size": 600}


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    try:
        with disk(16 * PAGE):
            pass
    except NotAllowed as error:
        pytest.skip(f"this machine does not allow it: {error}")
    directory = tmp_path_factory.mktemp("full")
    with hub(directory, SHAPE) as address:
        yield directory, address


LAST = "all but the manifest"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "level"),
    [
        ("download", "50%"),
        ("convert", LAST),
        ("prepare", LAST),
        ("lossless", "50%"),
        ("int4", "50%"),
        (OTHER_FULL, "50%"),
    ],
)
def test_a_full_disk_gives_one_clear_error_and_the_rerun_ends_well(
    endpoint: tuple[Path, str], command: str, level: str
) -> None:
    directory, address = endpoint
    (case,) = cases(directory, address, [command])
    sentence = trial(case, case.levels(1)[level], address, ballast=False)
    if command == "convert":
        assert "free" in refused(case, address)
        assert "manifest.json: the disk is full" in sentence
