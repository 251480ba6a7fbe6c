"""What a batch leaves: a file with a line for each of its lines, in their order, and one for those that failed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from runner.server.jobs.batches import Batch
from runner.server.jobs.lines import Line, line_id
from runner.server.streams import as_json

CANCELLED = {"code": "batch_cancelled", "message": "the batch was cancelled before this line was done"}


def output_line(batch: Batch, line: Line, custom_id: str, result: Mapping[str, Any] | None) -> bytes:
    """A line of the output; `result` has the status and the body of the answer, or is None if there is none."""
    name = line_id(batch, line.number)
    response = error = None
    if result is None:
        error = CANCELLED
    else:
        response = {"status_code": result["status"], "request_id": f"req_{name}", "body": result["body"]}
    document = {"id": f"batch_req_{name}", "custom_id": custom_id, "response": response, "error": error}
    return as_json(document) + b"\n"


def blocks(lines: Iterator[bytes], size: int = 2**20) -> Iterator[bytes]:
    """The lines, joined to blocks of at least `size` bytes."""
    block = bytearray()
    for line in lines:
        block += line
        if len(block) >= size:
            yield bytes(block)
            block.clear()
    if block:
        yield bytes(block)
