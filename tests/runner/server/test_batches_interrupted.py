"""An interrupted batch goes on where it was: no line is lost or done twice, and its files have the same bytes."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from openai.types import Batch

import runner
from runner.errors import BloomdeskError
from runner.generation.live_batch import LiveBatch
from runner.generation.model import Model
from runner.generation.options import GenerationOptions
from runner.server.jobs import worker
from runner.server.jobs.journal import Journal
from tests.support.jobs import COMPLETIONS, begin, ended, line, new_data, openai_of, wait_for_pause
from tests.support.serving import client_of

pytest.importorskip("python_multipart")
OPTIONS = GenerationOptions(batch=3)
SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"enum": ["a", "bc", [1, 2, 3]]}}}
LINES = [
    line(1, max_tokens=9),
    line(2, max_tokens=20, temperature=1.2, logprobs=2, n=2),
    line(3, max_tokens=4, echo=True, logprobs=1, prompt=["One two three four", "Five"]),
    line(4, max_tokens=14, temperature=0.8, best_of=3),
    line(5, max_tokens=0, echo=True, logprobs=0),
    line(6, max_tokens=30, stop=["e", "a"], temperature=1.0),
    line(7, max_tokens=30, temperature=1.0, logprobs=1, presence_penalty=1.0, response_format=SCHEMA),
]


class Whole:
    """A batch's data directory, as a kill would have left it at several moments, and its output."""

    def __init__(self, model: Model, base: Path) -> None:
        data, self.states = new_data(base / "data"), []
        with client_of(model, options=OPTIONS, data=data) as client:
            self.batch = begin(openai_of(client), LINES)
            batch, seen = self.batch, -1
            while batch.status in ("validating", "in_progress", "finalizing"):
                now = self._moment(data)
                if now != seen:
                    seen = now
                    self._copy(data, base / f"state-{seen}")
                batch = openai_of(client).batches.retrieve(batch.id)
            self.output = openai_of(client).files.content(batch.output_file_id).content

    @property
    def middle(self) -> Path:
        return self.states[len(self.states) // 2]

    @staticmethod
    def _moment(data: Path) -> int:
        return sum(path.stat().st_size for path in (data / "batches").glob("*.journal"))

    def _copy(self, data: Path, state: Path) -> None:
        """As a kill would leave it now; what is renamed or removed meanwhile is left for another time."""
        try:
            shutil.copytree(data, state)
        except (shutil.Error, FileNotFoundError):
            shutil.rmtree(state, ignore_errors=True)
            return
        # Only a batch that runs has one.
        if any((state / "batches").glob("*.journal")):
            self.states.append(state)
        else:
            shutil.rmtree(state)


@pytest.fixture(scope="module")
def whole(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(model, tmp_path_factory.mktemp("whole"))


def finished(model: Model, data: Path, batch: Batch, options: GenerationOptions = OPTIONS) -> bytes:
    """The output of a batch in `data`, once a server has ended it."""
    with client_of(model, options=options, data=data) as client:
        openai = openai_of(client)
        batch = ended(openai, batch)
        assert (batch.status, batch.error_file_id) == ("completed", None)
        assert batch.request_counts.completed == batch.request_counts.total == len(LINES)
        return openai.files.content(batch.output_file_id).content


def test_whatever_a_kill_leaves_comes_to_the_same_bytes(model: Model, whole: Whole, tmp_path: Path) -> None:
    assert len(whole.states) >= 5
    chosen = random.Random(1).sample(whole.states, min(8, len(whole.states)))
    for number, state in enumerate(chosen):
        data = Path(shutil.copytree(state, tmp_path / f"{number}"))
        assert finished(model, data, whole.batch) == whole.output
        assert not list((data / "batches").glob("*.journal"))


def test_a_journal_that_is_cut_or_damaged_anywhere_comes_to_the_same_bytes(
    model: Model, whole: Whole, tmp_path: Path
) -> None:
    source = random.Random(2)
    for number in range(8):
        data = Path(shutil.copytree(whole.states[-1], tmp_path / f"{number}"))
        (journal,) = (data / "batches").glob("*.journal")
        content = bytearray(journal.read_bytes())
        place = source.randrange(len(content))
        if number % 2:
            content[place] ^= 1 << source.randrange(8)
        else:
            del content[place:]
        journal.write_bytes(content)
        assert finished(model, data, whole.batch) == whole.output


def test_tokens_of_the_journal_are_not_made_again(model: Model, whole: Whole, tmp_path: Path) -> None:
    data = Path(shutil.copytree(whole.states[-1], tmp_path / "data"))
    (path,) = (data / "batches").glob("*.journal")
    journal = Journal(path)
    known = sum(len(record.get("ids", ())) for _, record in journal.records())
    journal.close()
    made = json.loads("[" + whole.output.decode().replace("\n", ",").rstrip(",") + "]")
    all_tokens = sum(each["response"]["body"]["usage"]["completion_tokens"] for each in made)
    assert 0 < known <= all_tokens
    with client_of(model, options=OPTIONS, data=data) as client:
        ended(openai_of(client), whole.batch)
        # What must follow needs no pass, so it may be made again.
        assert client.engine.totals.new_tokens <= all_tokens - known + 9


def test_each_line_goes_on_after_the_server_ended_between_passes(model: Model, tmp_path: Path) -> None:
    data, lines = new_data(tmp_path / "data"), [line(number, max_tokens=25) for number in range(5)]
    with client_of(model, data=data) as client:
        batch = begin(openai_of(client), lines)
        ended(openai_of(client), batch, "in_progress")
        while client.engine.totals.new_tokens < 20:
            pass
    with client_of(model, data=data) as client:
        found = ended(openai_of(client), batch)
        assert found.request_counts.completed == 5
        assert client.engine.totals.new_tokens <= 125 - 20
        first = json.loads(openai_of(client).files.content(found.output_file_id).text.splitlines()[0])
        alone = client.post(COMPLETIONS, json=lines[0]["body"]).json()
    assert first["response"]["body"]["choices"] == alone["choices"]


def test_other_options_of_the_server_change_no_byte(model: Model, whole: Whole, tmp_path: Path) -> None:
    for number, options in enumerate(
        [GenerationOptions(batch=1, speculate="off"), GenerationOptions(batch=16)]
    ):
        data = Path(shutil.copytree(whole.middle, tmp_path / f"{number}"))
        assert finished(model, data, whole.batch, options) == whole.output


def test_another_model_leaves_the_batch_for_its_own(
    model: Model, whole: Whole, prepared: Any, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(whole.middle, tmp_path / "data"))
    other = runner.load(prepared(blocks=2)[1])
    with client_of(other, data=data) as client:
        wait_for_pause(openai_of(client), whole.batch, "another model, bloom")
        found = openai_of(client).batches.retrieve(whole.batch.id)
        assert found.status == "in_progress" and found.usage.output_tokens > 0
        own = begin(openai_of(client), [line(1)])
        assert ended(openai_of(client), own).status == "completed"
    assert finished(model, data, whole.batch) == whole.output


def test_a_batch_of_another_model_can_be_cancelled(whole: Whole, prepared: Any, tmp_path: Path) -> None:
    data = Path(shutil.copytree(whole.middle, tmp_path / "data"))
    with client_of(runner.load(prepared(blocks=2)[1]), data=data) as client:
        openai_of(client).batches.cancel(whole.batch.id)
        assert ended(openai_of(client), whole.batch).status == "cancelled"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is tried again soon."""
    for name in ("FIRST_WAIT", "LONGEST_WAIT", "PASS_WAIT"):
        monkeypatch.setattr(worker, name, 0.02)


def test_a_full_disk_pauses_a_batch_which_goes_on_when_there_is_room(
    model: Model, whole: Whole, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, is_full, sync = Path(shutil.copytree(whole.states[1], tmp_path / "data")), [True], os.fsync

    def full(descriptor: int) -> None:
        if is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with client_of(model, options=OPTIONS, data=data) as client:
        openai = openai_of(client)
        wait_for_pause(openai, whole.batch, "the disk is full")
        is_full.clear()
        batch = ended(openai, whole.batch)
        assert openai.files.content(batch.output_file_id).content == whole.output
        assert batch.model_extra["paused"] is None


def test_a_pass_that_fails_fails_no_line(
    model: Model, whole: Whole, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, step, count = Path(shutil.copytree(whole.states[0], tmp_path / "data")), LiveBatch.step, [0]

    def fails(batch: LiveBatch) -> Any:
        count[0] += 1
        if count[0] % 4 == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "block_01.safetensors")
        return step(batch)

    monkeypatch.setattr(LiveBatch, "step", fails)
    assert finished(model, data, whole.batch) == whole.output


def test_a_damaged_input_is_named_and_nothing_is_made_of_it(
    model: Model, whole: Whole, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(whole.middle, tmp_path / "data"))
    path = data / "files" / f"{whole.batch.input_file_id}.data"
    path.write_bytes(path.read_bytes().replace(b"Line", b"Lime"))
    with client_of(model, data=data) as client:
        wait_for_pause(openai_of(client), whole.batch, "damaged")


def test_less_ram_pauses_a_batch_and_says_so(
    model: Model, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(shutil.copytree(whole.middle, tmp_path / "data"))

    def little(_: LiveBatch, request: object) -> None:
        raise BloomdeskError("1 MB of RAM are too little")

    monkeypatch.setattr(LiveBatch, "check", little)
    with client_of(model, data=data) as client:
        wait_for_pause(openai_of(client), whole.batch, "too little")
