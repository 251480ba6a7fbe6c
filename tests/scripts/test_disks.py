"""The benchmark of several disks: what it reads of its options, and brakes that hold for each disk by itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.bench.control_group import NoControlGroups, control_group
from scripts.bench.disks import Mounts, in_words, pairs, row
from scripts.bench.harness import Point, Turn
from scripts.bench.turns import CannotRun, Limits

MB = 10**6


def test_rates_of_disks_are_read() -> None:
    assert pairs("0.4,0.4+0.2") == [(0.4e9,), (0.4e9, 0.2e9)]
    assert [in_words(rates) for rates in pairs("0.4,0.4+0.2")] == ["0.4", "0.4+0.2"]


def test_a_pass_is_compared_with_the_sum_of_the_brakes(tmp_path: Path) -> None:
    limits = Limits(10**9, 0.4e9, ((tmp_path, 0.2e9),))
    report = {
        "seconds": [9.0, 11.0, 10.0],
        "streamed_bytes": 5.7e9,
        "waiting_seconds": [8.0, 8.0],
        "read_bytes": [0, 0, 0],
        "resident_bytes": 0,
        "peak_rss": 1,
    }
    turn = Turn(report=report, point="0.4+0.2", round=1)
    found = row(None, Point("0.4+0.2", [], limits, tmp_path), [turn], [])  # type: ignore[arg-type]
    assert found["brakes"] == pytest.approx(0.6e9) and found["seconds"] == 10.5
    assert found["share"] == pytest.approx(5.7 / 10.5 / 0.6)


@pytest.mark.slow
def test_each_disk_has_its_own_brake(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from runner.estimate.rates import disk_rates;"
    code += "print(*disk_rates([[Path(each)] for each in sys.argv[1:]]))"
    try:
        with Mounts() as mounts:
            disks = [mounts.disk(tmp_path / name, 64 * MB) for name in "ab"]
            for disk in disks:
                (disk / "file").write_bytes(os.urandom(48 * MB))
            os.sync()
            files = [str(disk / "file") for disk in disks]
            with control_group(read_rate=40 * MB, disk_of=disks[0], also=[(disks[1], 20 * MB)]) as group:
                began = time.monotonic()
                done = subprocess.run(
                    group.command([sys.executable, "-c", code, *files]),
                    capture_output=True,
                    text=True,
                    check=True,
                )
                assert time.monotonic() - began > 1
        assert [float(each) for each in done.stdout.split()] == pytest.approx([40 * MB, 20 * MB], rel=0.2)
        assert not any(disk.is_mount() for disk in disks)
    except (CannotRun, NoControlGroups) as error:
        pytest.skip(str(error))
