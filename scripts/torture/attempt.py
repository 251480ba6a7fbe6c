"""What the attacks on the miniature's preparation share: options, its repo and an undisturbed directory of it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from runner.format.coded import LOSSLESS, PLAIN
from scripts.fakehub import checkpoint as make_checkpoint
from scripts.fakehub.server import LocalHub
from toolkit.commands import prepare

REPO = "bloomdesk/miniature"


def options(module: str, description: str, count: str, default: int) -> argparse.Namespace:
    """How often (the option named `count`), the seed, and the form."""
    parser = argparse.ArgumentParser(prog=f"python -m scripts.torture.{module}", description=description)
    parser.add_argument(count, type=int, default=default, metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lossless", action="store_true")
    return parser.parse_args()


def source_of(work: Path) -> Path:
    """The miniature's repo in `work`."""
    make_checkpoint.miniature(work / "source")
    return work / "source"


def prepared(hub: LocalHub, directory: Path, lossless: bool) -> dict[str, bytes]:
    """Prepare the repo that the hub serves, undisturbed: the bytes of each file."""
    os.environ["HF_ENDPOINT"] = hub.endpoint
    prepare.prepare(REPO, directory, form=LOSSLESS if lossless else PLAIN)
    return content(directory)


def content(directory: Path) -> dict[str, bytes]:
    """The bytes of each file by its name."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}
