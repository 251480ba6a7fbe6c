"""The download record: what it keeps, and that damage to it is never taken for knowledge."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runner.errors import BloomdeskError
from runner.format.digest import digest
from toolkit.hub.record import RECORD, DownloadRecord, RecordedFile, load_record, save_record
from toolkit.hub.revision import HubFile, Revision

LARGE = HubFile("model.bin", 5, "ab" * 32)
SMALL = HubFile("config.json", 2, None, "cd" * 20)
REVISION = Revision("someone/bloom-small", "0" * 40, (LARGE, SMALL))


@pytest.fixture
def record():
    return DownloadRecord.of(REVISION, None).with_file("config.json", "ef" * 32, 7)


def test_what_is_saved_is_loaded(record, tmp_path):
    assert load_record(tmp_path) is None
    save_record(tmp_path, record)
    assert load_record(tmp_path) == record
    assert [path.name for path in tmp_path.iterdir()] == [RECORD]
    assert record.files["config.json"] == RecordedFile("config.json", 2, "ef" * 32, "cd" * 20, 7)
    assert record.files["model.bin"] == RecordedFile("model.bin", 5, "ab" * 32)


def test_a_fresh_record_is_its_revision():
    assert DownloadRecord.of(REVISION, None).revision == REVISION


def test_only_what_is_about_the_same_bytes_is_taken_over(record):
    assert DownloadRecord.of(REVISION, record) == record
    for changed in (HubFile("config.json", 3, None, "cd" * 20), HubFile("config.json", 2, None, "aa" * 20)):
        other = Revision(REVISION.repo, REVISION.commit, (LARGE, changed))
        assert DownloadRecord.of(other, record).files["config.json"].mtime_ns is None


def test_a_file_is_sound_while_size_and_time_are_those_of_its_check(record, tmp_path):
    assert record.missing_in(tmp_path) == ("model.bin", "config.json")
    path = tmp_path / "config.json"
    path.write_bytes(b"{}")
    os.utime(path, ns=(7, 7))
    assert record.missing_in(tmp_path) == ("model.bin",)
    os.utime(path, ns=(8, 8))
    assert not record.files["config.json"].sound_in(tmp_path)
    path.write_bytes(b"{ }")
    os.utime(path, ns=(7, 7))
    assert not record.files["config.json"].sound_in(tmp_path)


def assert_refused(directory, text):
    (directory / RECORD).write_bytes(text)
    with pytest.raises(BloomdeskError, match=r"not a sound download record") as caught:
        load_record(directory)
    assert "delete it" in caught.value.hint


def test_damage_is_an_error_that_says_what_to_do(record, tmp_path):
    sound = record.to_json()
    for text in ("", "[]", "{}", "null", sound[:-9], sound.replace('"size": 5', '"size": 6'), "[" * 100_000):
        assert_refused(tmp_path, text.encode())


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(min_value=0, max_value=1000), bit=st.integers(0, 7))
def test_no_flipped_bit_is_believed(tmp_path, at, bit):
    record = DownloadRecord.of(REVISION, None).with_file("config.json", "ef" * 32, 7)
    text = bytearray(record.to_json().encode())
    text[at % len(text)] ^= 1 << bit
    (tmp_path / RECORD).write_bytes(text)
    try:
        assert load_record(tmp_path) == record  # a flip in the white space between the values
    except BloomdeskError as error:
        assert "delete it" in error.hint


@pytest.mark.parametrize(
    "change",
    [
        {"path": "../x"}, {"path": "a/b"}, {"path": ".hidden"}, {"path": 3}, {"size": -1}, {"size": "5"},
        {"sha256": "short"}, {"sha256": None}, {"git_sha1": "AB" * 20}, {"mtime_ns": "7"}, {"extra": 1},
    ],
)  # fmt: skip
def test_a_record_of_impossible_files_is_refused_even_with_its_checksum(record, tmp_path, change):
    body = json.loads(record.to_json())
    body["files"][0] |= change
    del body["sha256"]
    assert_refused(tmp_path, json.dumps({**body, "sha256": digest(body)}).encode())
