"""A batch job for a server that is killed: made without a server, run by one until it is done, and checked at any time.

python -m scripts.torture.batch_job DST DATA    serves DST with --data DATA until all batches are done
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

from runner.cli.serve import ServeOptions, serve
from runner.format.manifest import load_manifest
from runner.server.jobs.batches import COMPLETED, Batch, Batches, Order
from runner.server.jobs.data import BATCHES, FILES, JOURNAL, data_directory, read_record
from runner.server.jobs.files import INPUT, Files
from runner.server.jobs.journal import records

ENDPOINT = "/v1/completions"
LOOK = 0.05
# Ways of asking, one after the other.
WAYS = (
    {"temperature": 0},
    {"temperature": 0.9, "top_p": 0.95, "logprobs": 2},
    {"temperature": 1.2, "n": 2, "stop": ["\n\n", "e s"]},
    {"temperature": 0.7, "best_of": 2, "echo": True, "logprobs": 0},
)


def make(directory: Path, data: Path, lines: int, tokens: int) -> None:
    """A data directory with one batch of `lines`, each of up to `tokens` new tokens, of which nothing is done."""
    with data_directory(data):
        files, batches = Files(data / FILES, time.time), Batches(data / BATCHES, time.time)
        file = files.add("in.jsonl", INPUT, (_line(number, tokens) for number in range(lines)))
        fingerprint = load_manifest(directory).fingerprint
        batches.create(Order(ENDPOINT, file.id, "30d", time.time(), None, "bloom", fingerprint, None))


def _line(number: int, tokens: int) -> bytes:
    body = {"prompt": f"Number {number} is", "max_tokens": tokens, "ignore_eos": True}
    body |= WAYS[number % len(WAYS)]
    line = {"custom_id": f"{number}", "method": "POST", "url": ENDPOINT, "body": body}
    return json.dumps(line).encode() + b"\n"


def batch_in(data: Path) -> Batch:
    (path,) = (data / BATCHES).glob("*.json")
    return Batch.of_record(read_record(path))


def output(data: Path) -> list[bytes]:
    """The lines of the output of a batch that has come to its end with no line failed."""
    batch = batch_in(data)
    assert (batch.status, batch.failed, batch.completed) == (COMPLETED, 0, batch.total), batch
    return (data / FILES / f"{batch.output_file_id}.data").read_bytes().splitlines(keepends=True)


class Watch:
    """What must hold after each kill; `expected` is the output of an undisturbed run."""

    def __init__(self, data: Path, expected: list[bytes]) -> None:
        self._data, self._seen = data, b""
        self._bodies = [json.loads(line)["response"]["body"] for line in expected]

    def begin(self) -> None:
        self._seen = b""

    def has_grown(self) -> bool:
        """Whether the journal has more than at the last kill."""
        return len(self._content()) > len(self._seen)

    def _content(self) -> bytes:
        """The whole lines of the journal."""
        for journal in (self._data / BATCHES).glob(f"*{JOURNAL}"):
            with suppress(FileNotFoundError):
                content = journal.read_bytes()
                return content[: content.rfind(b"\n") + 1]
        return b""

    def check(self) -> str:
        """When the kill came. Raises AssertionError if something on the disk is lost, wrong or there twice."""
        journals = list((self._data / BATCHES).glob(f"*{JOURNAL}"))
        if not journals:
            return "kills before the first token or after the last"
        whole = self._content()
        assert whole.startswith(self._seen), "something that was on the disk is gone"
        is_new, self._seen = len(whole) > len(self._seen), whole
        counts, results = defaultdict(lambda: [0, 0, 0]), set()
        for _, record in records(journals[0]):
            number = record["line"]
            assert number not in results, f"line {number} goes on after its result"
            if "status" in record:
                results.add(number)
                assert record["body"] == self._bodies[number - 1], f"line {number} has another result"
                continue
            known = counts[number, record["place"]]
            assert record["at"] == known, f"tokens of line {number} are there twice, or are missing"
            for place, name in enumerate(("ids", "scores", "prompt_scores")):
                known[place] += len(record.get(name, ()))
        return "kills while tokens were made" if is_new else "kills while the server started"


def _end_when_done(data: Path) -> None:
    # At once, if it was killed after the last line: then the server takes no signal yet.
    while batch_in(data).status != COMPLETED or signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        time.sleep(LOOK)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """Exit status of a server that ends when its batch is done."""
    directory, data = map(Path, sys.argv[1:])
    threading.Thread(target=_end_when_done, args=(data,), daemon=True).start()
    return serve(ServeOptions(directory, port=0, data=data))


if __name__ == "__main__":
    sys.exit(main())
