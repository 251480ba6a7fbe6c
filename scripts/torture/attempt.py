"""What the attacks on `bloomdesk` share: the miniature's repo, a command's environment, a directory's content."""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from runner.errors import BloomdeskError
from runner.format.coded import PLAIN
from runner.format.layout import MANIFEST, MANIFEST_BACKUP, SPREADING
from runner.format.manifest import Manifest, load_manifest, read_manifest
from runner.format.quantised import FORMS
from scripts.fakehub import checkpoint as make_checkpoint
from scripts.fakehub.server import LocalHub
from toolkit.commands import prepare
from toolkit.hub.record import RECORD
from toolkit.parts.release import file_hash

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


def placeless(directory: Path) -> dict[str, bytes]:
    """The bytes of each file by its path; the manifests of slices without the places where they were made."""
    found = content(directory)
    for name in (MANIFEST, MANIFEST_BACKUP):
        with suppress(BloomdeskError):
            found[name] = replace(read_manifest(directory / name), places=()).to_json().encode()
    return found


def assert_no_row_lost(whole: Manifest, here: Path, others: Sequence[Path]) -> int:
    """How many parts of `whole` a `spread` has taken from `here`; AssertionError if one is neither whole nor proven.

    Proven is one whose slices are as their manifests record them, the first in `here` or where that is made.
    """
    first, *rest = [_slices(here / SPREADING, here), *map(_slices, others)]
    spread = 0
    for file, record in whole.parts.items():
        if _has(here, file, {record.xxh3_128}):
            continue
        own = first.get(file, set())
        assert any(_has(each, file, own) for each in (here, here / SPREADING)), f"{file}: no first slice"
        for each, hashes in zip(others, rest, strict=True):
            assert _has(each, file, hashes.get(file, ())), f"{file}: no slice in {each.name}"
        spread += 1
    return spread


def _has(directory: Path, file: str, hashes: Collection[str]) -> bool:
    return (directory / file).is_file() and file_hash(directory / file) in hashes


def _slices(*directories: Path) -> dict[str, set[str]]:
    """The hashes that each part of a slice has by the sound manifests of these directories."""
    found: dict[str, set[str]] = {}
    for each in directories:
        with suppress(BloomdeskError):
            manifest = load_manifest(each)
            for file, record in manifest.parts.items() if manifest.slice is not None else ():
                found.setdefault(file, set()).add(record.xxh3_128)
    return found


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
