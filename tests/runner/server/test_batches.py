"""`/v1/batches`: openai-python sends a file, and each line comes back with the answer that its request alone gets."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, ConflictError, NotFoundError, OpenAI
from openai.types import Batch
from starlette.testclient import TestClient

import runner
from runner.generation.model import Model
from runner.generation.options import GenerationOptions
from runner.server.settings import Settings
from tests.support.serving import client_of

pytest.importorskip("python_multipart")
COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def model(prepared) -> Model:
    return runner.load(prepared()[1])


@pytest.fixture
def client(model: Model, tmp_path: Path) -> Iterator[TestClient]:
    (tmp_path / "files").mkdir()
    (tmp_path / "batches").mkdir()
    with client_of(model, data=tmp_path) as client:
        yield client


@pytest.fixture
def openai(client: TestClient) -> OpenAI:
    return openai_of(client)


def openai_of(client: TestClient) -> OpenAI:
    return OpenAI(api_key="none", base_url="http://localhost/v1", http_client=client, max_retries=0)


def line(number: int, url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    return {
        "custom_id": f"id-{number}",
        "method": "POST",
        "url": url,
        "body": {"prompt": f"Line {number}", "max_tokens": 6, "temperature": 0, **body},
    }


def begin(openai: OpenAI, lines: list[Any], **fields: Any) -> Batch:
    text = "".join(each if isinstance(each, str) else json.dumps(each) + "\n" for each in lines)
    file = openai.files.create(file=("in.jsonl", text.encode()), purpose="batch")
    fields = {"endpoint": COMPLETIONS, "completion_window": "24h", **fields}
    return openai.batches.create(input_file_id=file.id, **fields)


def ended(openai: OpenAI, batch: Batch, *statuses: str) -> Batch:
    """The batch when it has come to one of `statuses`, by default the last ones."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        batch = openai.batches.retrieve(batch.id)
        if batch.status in (statuses or ("completed", "failed", "cancelled")):
            return batch
        time.sleep(0.005)
    raise AssertionError(f"still {batch.status}: {batch.model_extra}")


def results(openai: OpenAI, file_id: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in openai.files.content(file_id).text.splitlines()]


def test_each_line_has_the_answer_of_its_request_alone(client: TestClient, openai: OpenAI) -> None:
    lines = [
        line(1),
        line(2, n=2, temperature=1.2, seed=5, logprobs=1),
        line(3, prompt=[[5, 6, 7], [8, 9]], echo=True, logprobs=2, max_tokens=3),
        line(4, best_of=3, temperature=0.9, seed=1, stop="e"),
        line(5, echo=True, max_tokens=0, logprobs=0),
    ]
    batch = begin(openai, lines, metadata={"night": "1"})
    assert batch.status == "validating" and batch.metadata == {"night": "1"} and batch.errors is None
    batch = ended(openai, batch)
    assert (batch.status, batch.error_file_id, batch.errors) == ("completed", None, None)
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (5, 5, 0)
    found = results(openai, batch.output_file_id)
    assert [each["custom_id"] for each in found] == [each["custom_id"] for each in lines]
    for each, given in zip(found, lines, strict=True):
        alone = client.post(COMPLETIONS, json=given["body"]).json()
        response, body = each["response"], each["response"]["body"]
        assert (each["error"], response["status_code"]) == (None, 200)
        assert {**body, "id": 0, "created": 0} == {**alone, "id": 0, "created": 0}
        assert body["created"] == batch.created_at
    assert len({each["id"] for each in found}) == len({each["response"]["request_id"] for each in found}) == 5
    assert batch.usage.output_tokens == sum(
        each["response"]["body"]["usage"]["completion_tokens"] for each in found
    )
