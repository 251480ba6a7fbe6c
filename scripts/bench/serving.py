"""A server in a process of its own, for what measures or tortures it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from scripts.fakehub import checkpoint
from toolkit.commands.convert import convert

# A server of any model is ready by then.
SECONDS = 120
COMMAND = (sys.executable, "-m", "toolkit.cli.app")


def miniature(work: Path) -> Path:
    """The miniature, prepared in `work`."""
    directory = work / "bloom"
    if not directory.exists():
        checkpoint.miniature(work / "source")
        convert(work / "source", directory)
    return directory


@contextmanager
def running_server(
    model: Path | None, work: Path, *options: str, command: Sequence[str] = COMMAND
) -> Iterator[tuple[str, psutil.Process]]:
    """(address, process) of a server of `model`, or of the miniature; its log is in `work`."""
    log = work / "server.log"
    command = [*command, "serve", str(model or miniature(work)), "--port", "0", *options]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + SECONDS
        url = None
        while url is None or not _is_ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not come up:\n{log.read_text()}")
            found = re.search(r"at (http://\S+)/v1", log.read_text())
            url = found[1] if found else None
            time.sleep(0.05)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(SECONDS)


def _is_ready(url: str) -> bool:
    with suppress(OSError):
        return urllib.request.urlopen(f"{url}/health").status == 200
    return False
