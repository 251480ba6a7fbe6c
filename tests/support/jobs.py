"""Files and batches, as a client of the server sends and reads them, by openai-python."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from openai import OpenAI
from openai.types import Batch
from starlette.testclient import TestClient

from runner.server.jobs.data import data_directory
from tests.support.streaming import LONGEST

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
LAST = ("completed", "failed", "cancelled")


def new_data(path: Path) -> Path:
    """An empty data directory, which nobody holds."""
    with data_directory(path) as data:
        return data


def openai_of(client: TestClient) -> OpenAI:
    return OpenAI(api_key="none", base_url="http://localhost/v1", http_client=client, max_retries=0)


def line(number: int, url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    """A line for `prompt`, or for what `body` has in its place."""
    given = {"prompt": f"Line {number}", "max_tokens": 6, "temperature": 0, **body}
    body = {name: value for name, value in given.items() if value is not None}
    return {"custom_id": f"id-{number}", "method": "POST", "url": url, "body": body}


def text_of(lines: list[Any]) -> bytes:
    return "".join(each if isinstance(each, str) else json.dumps(each) + "\n" for each in lines).encode()


def begin(openai: OpenAI, lines: list[Any], **fields: Any) -> Batch:
    """A batch of these lines; one that is a text goes as it is."""
    file = openai.files.create(file=("in.jsonl", text_of(lines)), purpose="batch")
    fields = {"endpoint": COMPLETIONS, "completion_window": "24h", **fields}
    return openai.batches.create(input_file_id=file.id, **fields)


def ended(openai: OpenAI, batch: Batch, *statuses: str) -> Batch:
    """The batch when it has come to one of `statuses`, by default the last ones."""
    deadline = time.monotonic() + LONGEST
    while time.monotonic() < deadline:
        batch = openai.batches.retrieve(batch.id)
        if batch.status in (statuses or LAST):
            return batch
        time.sleep(0.002)
    raise AssertionError(f"still {batch.status}: {batch.model_extra}")


def wait_for_pause(openai: OpenAI, batch: Batch, words: str) -> None:
    """Return when the batch says that it does not go on, with these words."""
    deadline = time.monotonic() + LONGEST
    while time.monotonic() < deadline:
        if words in (openai.batches.retrieve(batch.id).model_extra["paused"] or ""):
            return
        time.sleep(0.002)
    raise AssertionError(f"it is not paused for: {words}")


def results(openai: OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(line) for line in openai.files.content(file_id).text.splitlines()]
