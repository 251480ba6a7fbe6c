"""`/v1/files`: what is sent is kept, byte for byte, and found again by the next server; bounds and errors are named."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import APIStatusError, OpenAI
from starlette.testclient import TestClient

from runner.errors import BloomdeskError
from runner.generation.model import Model
from runner.server.jobs.data import data_directory
from runner.server.settings import Settings
from tests.support.jobs import COMPLETIONS, begin, ended, line, new_data, openai_of
from tests.support.serving import client_of, wait_for

pytest.importorskip("python_multipart")
CONTENT = bytes(range(256)) * 20_000


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_data(tmp_path_factory.mktemp("server") / "data")


@pytest.fixture(scope="module")
def client(model: Model, data: Path) -> Iterator[TestClient]:
    with client_of(model, Settings(most_file_bytes=6_000_000), data=data) as client:
        yield client


@pytest.fixture(scope="module")
def openai(client: TestClient) -> OpenAI:
    return openai_of(client)


def test_a_file_comes_back_as_it_was_sent(openai: OpenAI) -> None:
    sent = openai.files.create(file=("../näme.jsonl", CONTENT), purpose="batch")
    assert (sent.filename, sent.bytes, sent.purpose) == ("../näme.jsonl", len(CONTENT), "batch")
    assert openai.files.retrieve(sent.id) == sent
    response = openai.files.content(sent.id)
    assert response.content == CONTENT
    assert response.response.headers["x-content-type-options"] == "nosniff"
    assert "attachment" in response.response.headers["content-disposition"]


@pytest.mark.parametrize("left", [None, b"", CONTENT[:-1]])
def test_a_file_whose_bytes_are_gone_is_named(openai: OpenAI, data: Path, left: bytes | None) -> None:
    sent = openai.files.create(file=("a", CONTENT), purpose="batch")
    path = data / "files" / f"{sent.id}.data"
    path.unlink() if left is None else path.write_bytes(left)
    with pytest.raises(APIStatusError, match=f"{sent.id} are missing or damaged") as error:
        openai.files.content(sent.id)
    assert error.value.status_code == 500
    batch = openai.batches.create(input_file_id=sent.id, endpoint=COMPLETIONS, completion_window="24h")
    wait_for(lambda: "missing or damaged" in (openai.batches.retrieve(batch.id).paused or ""))
    openai.batches.cancel(batch.id)


def test_files_are_listed_by_pages_and_by_purpose(openai: OpenAI) -> None:
    made = [openai.files.create(file=("a", b"x" * number), purpose="batch").id for number in range(4)]
    batch = ended(openai, begin(openai, [line(1)]))
    newest = [file.id for file in openai.files.list(limit=2)]
    assert newest[0] == batch.output_file_id and newest[2:6] == made[::-1]
    oldest = [file.id for file in openai.files.list(order="asc", purpose="batch", limit=3)]
    assert [name for name in oldest if name in made] == made and batch.output_file_id not in oldest
    assert next(iter(openai.files.list(purpose="batch_output"))).id == batch.output_file_id


def test_a_deleted_file_is_gone_from_the_disk(openai: OpenAI, data: Path) -> None:
    sent = openai.files.create(file=("a", b"x"), purpose="batch")
    assert list((data / "files").glob(f"{sent.id}*"))
    assert openai.files.delete(sent.id).deleted
    assert not list((data / "files").glob(f"{sent.id}*"))
    for act in (openai.files.retrieve, openai.files.content, openai.files.delete):
        with pytest.raises(APIStatusError) as error:
            act(sent.id)
        assert error.value.status_code == 404


def test_a_file_that_a_batch_needs_is_not_deleted(openai: OpenAI) -> None:
    batch = begin(openai, [line(1, max_tokens=900, ignore_eos=True)])
    with pytest.raises(APIStatusError) as error:
        openai.files.delete(batch.input_file_id)
    assert error.value.status_code == 409 and batch.id in error.value.message
    openai.batches.cancel(batch.id)
    ended(openai, batch)
    assert openai.files.delete(batch.input_file_id).deleted


@pytest.mark.parametrize("name", ["file-0", "../../../etc/passwd", "file-" + "0" * 24, "..%2f..%2fdata"])
def test_a_name_that_a_client_made_up_is_not_found(client: TestClient, name: str) -> None:
    for path in (f"/v1/files/{name}", f"/v1/files/{name}/content"):
        assert client.get(path).status_code == 404


@pytest.mark.parametrize(
    ("fields", "files", "status", "param"),
    [
        ({"purpose": "fine-tune"}, {"file": ("a", b"x")}, 400, "purpose"),
        ({}, {"file": ("a", b"x")}, 400, "purpose"),
        ({"purpose": "batch", "file": "text"}, {"other": ("a", b"x")}, 400, "other"),
        ({"purpose": "batch", "expires_after": "1"}, {"file": ("a", b"x")}, 400, "expires_after"),
        (
            {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"},
            {"file": ("a", b"x")},
            400,
            "expires_after[anchor]",
        ),
        ({"purpose": "batch"}, {"file": ("a", b"x" * 6_000_001)}, 413, "file"),
        ({"purpose": "batch"}, {"file": ("a", b"x" * 7_000_000)}, 413, "file"),
        ({"purpose": "batch" * 1000}, {"file": ("a", b"x")}, 400, None),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_form_that_is_not_as_it_should_be_is_refused(
    client: TestClient, data: Path, fields: dict, files: dict, status: int, param: str | None
) -> None:
    before = set((data / "files").iterdir())
    response = client.post("/v1/files", data=fields, files=files)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    assert set((data / "files").iterdir()) == before


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"content-type": "application/json"}, b"{}", 415),
        ({"content-type": "multipart/form-data"}, b"x", 400),
        ({"content-type": "multipart/form-data; boundary=a"}, b"--b\r\n\r\n", 400),
        ({"content-type": "multipart/form-data; boundary=a", "origin": "http://evil.example"}, b"", 403),
    ],
    ids=str,
)
def test_other_bodies_and_other_sites_are_refused(
    client: TestClient, headers: dict, body: bytes, status: int
) -> None:
    assert client.post("/v1/files", headers=headers, content=body).status_code == status


def test_a_full_disk_is_said_and_nothing_of_the_file_stays(
    client: TestClient, openai: OpenAI, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = set((data / "files").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        response = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a", b"x")})
    assert response.status_code == 507 and "disk is full" in response.json()["error"]["message"]
    assert set((data / "files").iterdir()) == before


def test_the_next_server_has_the_files_and_not_what_was_cut_off(model: Model, tmp_path: Path) -> None:
    data = new_data(tmp_path / "data")
    with client_of(model, data=data) as client:
        sent = openai_of(client).files.create(file=("a", CONTENT), purpose="batch")
    (data / "files" / ("file-" + "1" * 24 + ".data")).write_bytes(b"without a record")
    (data / "files" / ("file-" + "2" * 24 + ".data.incomplete")).write_bytes(b"half")
    new_data(data)
    with client_of(model, data=data) as client:
        assert openai_of(client).files.retrieve(sent.id) == sent
        assert openai_of(client).files.content(sent.id).content == CONTENT
    assert len(list((data / "files").iterdir())) == 2


def test_a_damaged_record_is_named(model: Model, tmp_path: Path) -> None:
    data = new_data(tmp_path / "data")
    with client_of(model, data=data) as client:
        openai_of(client).files.create(file=("a", b"x"), purpose="batch")
    (record,) = (data / "files").glob("*.json")
    record.write_bytes(record.read_bytes().replace(b'"batch"', b'"bitch"'))
    with pytest.raises(BloomdeskError, match=record.name), client_of(model, data=data):
        pass


def test_a_data_directory_has_one_server_and_is_nothing_else(tmp_path: Path) -> None:
    data = new_data(tmp_path / "data")
    with (
        data_directory(data),
        pytest.raises(BloomdeskError, match="another bloomdesk"),
        data_directory(data),
    ):
        pass
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(BloomdeskError, match=name), data_directory(tmp_path / name):
            pass
