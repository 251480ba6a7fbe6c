"""`bloomdesk serve` as a process of its own, on a free port."""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.serving import wait_for
from tests.support.streaming import LONGEST

ROOT = Path(__file__).resolve().parents[2]


class ServerProcess:
    """A running server; `log` is the file that its standard error goes to."""

    def __init__(self, process: subprocess.Popen, log: Path) -> None:
        self.process, self.log = process, log
        wait_for(lambda: self._address() is not None or process.poll() is not None)
        self.url = self._address() or ""

    def _address(self) -> str | None:
        found = re.search(r"at (http://\S+)/v1", self.log.read_text())
        return found[1] if found else None

    def wait_until_ready(self) -> None:
        def is_ready() -> bool:
            # A failed one has no address.
            with suppress(OSError, ValueError):
                return urllib.request.urlopen(f"{self.url}/health", timeout=LONGEST).status == 200
            return self.process.poll() is not None

        wait_for(is_ready)


@contextmanager
def server_process(directory: Path, work: Path, *options: str) -> Iterator[ServerProcess]:
    """A server of `directory` that is ready; it is killed at the end, if it runs still."""
    log = work / "server.log"
    command = [sys.executable, "-m", "toolkit.cli.start", "serve", str(directory), "--port", "0", *options]
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
    try:
        server = ServerProcess(process, log)
        server.wait_until_ready()
        yield server
    finally:
        process.kill()
        process.wait()
