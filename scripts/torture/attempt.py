"""What the attacks on `bloomdesk` share: the miniature's repo, a command's environment, a directory's content."""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from runner.format.coded import PLAIN
from runner.format.quantised import FORMS
from scripts.fakehub import checkpoint as make_checkpoint
from scripts.fakehub.server import LocalHub
from toolkit.commands import prepare
from toolkit.hub.record import RECORD

REPO = "bloomdesk/miniature"
ROOT = Path(__file__).resolve().parents[2]
BLOOMDESK = (sys.executable, "-m", "toolkit.cli.app")


def attack(
    run: Callable[[int, int, Path, str], Counter[str]], description: str, count: str, default: int
) -> None:
    """Call `run` with the options `count`, seed and form and an empty directory, and print its counts."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(count, type=int, default=default, metavar="N", dest="count")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--form", choices=FORMS, default=PLAIN)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        counts = run(options.count, options.seed, Path(work), options.form)
    print(f"{dict(counts)}: every result byte-identical")


def source_of(work: Path) -> Path:
    """The miniature's repo, written into `work`."""
    make_checkpoint.miniature(work / "source")
    return work / "source"


def prepared(hub: LocalHub, directory: Path, form: str) -> dict[str, bytes]:
    """The files of an undisturbed preparation of the repo that the hub serves."""
    os.environ["HF_ENDPOINT"] = hub.endpoint
    prepare.prepare(REPO, directory, form=form)
    return content(directory)


def environment(endpoint: str) -> dict[str, str]:
    """The environment of a command that reads from the hub at `endpoint`, as an anonymous user."""
    left_out = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN")
    mine = {name: value for name, value in os.environ.items() if name not in left_out}
    return {**mine, "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}


def content(directory: Path) -> dict[str, bytes]:
    """The bytes of each file by its path; a download's record without the times of its files."""
    found = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        data = path.read_bytes()
        if path.name == RECORD:
            data = re.sub(rb'"(mtime_ns|sha256)": .*', b"", data)
        found[str(path.relative_to(directory))] = data
    return found
