"""A process that reads hostile files under a limit of memory and of time, and tells what reading made it do."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEMORY = 900 * 2**20
SECONDS = 30  # a shared machine can be slow; none of the files takes a second of processor time by itself

WORKER = r"""
import json, os, resource, sys, time
from pathlib import Path
from runner.errors import BloomdeskError
from runner.format.safetensors import read_header
from runner.format.manifest import load_manifest
from toolkit.source.config import read_config
from toolkit.hub.record import load_record
from toolkit.source.index import find_shards
from toolkit.source.shards import read_shard, read_source
readers = {"shard": read_shard, "header": read_header, "manifest": load_manifest, "record": load_record,
           "config": lambda path: read_config(path, "BF16"), "index": find_shards, "source": read_source}
done, watching = [], False
calls = ("os.", "subprocess.", "socket.", "pickle.", "ctypes.", "import", "exec", "compile")
def watch(event, arguments):
    if not watching:
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    what = f"{event} {arguments}"[:200]
    if (writes or event.startswith(calls)) and "encodings" not in what:  # Python brings in codecs as it needs them
        done.append(what)
Path("x").is_file()  # what is imported at its first use is imported now
sys.addaudithook(watch)
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
for line in sys.stdin:
    name, path = json.loads(line)
    done.clear()
    start, watching, error = time.process_time(), True, None
    try: readers[name](Path(path))
    except BloomdeskError as clear: error = clear.message
    except BaseException as other: error = f"!{type(other).__name__}: {other}"
    watching = False
    print(json.dumps({"error": error, "done": done, "seconds": time.process_time() - start}), flush=True)
"""


@dataclass(frozen=True)
class Outcome:
    """What became of reading a file: the clear error's message or None, what else was done, processor time."""

    error: str | None
    done: list[str]
    seconds: float


class Bounded:
    """Reads one file after another in one process, which is started again after a crash."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def read(self, reader: str, path: Path) -> Outcome:
        """Raises `AssertionError` if the process dies over it or takes longer than `SECONDS`."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", WORKER, str(MEMORY)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).resolve().parents[2],
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(SECONDS, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps([reader, str(path)]) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        finally:
            timer.cancel()
        if not answer:
            self.close()
            raise AssertionError(f"the process ended over it with {process.returncode}")
        body: dict[str, Any] = json.loads(answer)
        return Outcome(**body)

    def refuses(self, reader: str, path: Path) -> str:
        """The message of the one clear error; `AssertionError` for any other outcome."""
        outcome = self.read(reader, path)
        assert outcome.error is not None, "it was taken"
        assert not outcome.error.startswith("!"), outcome.error
        assert outcome.error.isprintable() and len(outcome.error) < 1000, outcome.error
        assert not outcome.done, outcome.done
        assert outcome.seconds < 8
        return outcome.error

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()
            self._process = None
