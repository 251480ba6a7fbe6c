"""A server that is killed in the middle of a batch: a short run of scripts/torture/kill.py --command serve."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from runner.generation.model import Model
from runner.server.jobs.batches import COMPLETED
from scripts.torture import batch_job
from tests.support.server_process import server_process
from tests.support.serving import client_of, wait_for

pytestmark = pytest.mark.slow


def is_done(data: Path) -> bool:
    return batch_job.batch_in(data).status == COMPLETED


def journal_bytes(data: Path) -> int:
    return sum(path.stat().st_size for path in (data / "batches").glob("*.journal"))


def test_a_killed_server_goes_on_and_its_output_has_the_same_bytes(
    model: Model, prepared, tmp_path: Path
) -> None:
    directory, data, calm = prepared()[1], tmp_path / "data", tmp_path / "calm"
    batch_job.make(directory, data, lines=8, tokens=150)
    shutil.copytree(data, calm)
    with client_of(model, data=calm):
        wait_for(lambda: is_done(calm))
    watch = batch_job.Watch(data, batch_job.output(calm))
    with server_process(directory, tmp_path, "--data", str(data)):
        wait_for(lambda: journal_bytes(data) > 0 or is_done(data))
    # It was killed with SIGKILL.
    watch.check()
    # This one is told to end between passes.
    with server_process(directory, tmp_path, "--data", str(data)) as server:
        before = journal_bytes(data)
        wait_for(lambda: journal_bytes(data) > before or is_done(data))
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
    with server_process(directory, tmp_path, "--data", str(data)):
        wait_for(lambda: is_done(data))
    assert batch_job.output(data) == batch_job.output(calm)
