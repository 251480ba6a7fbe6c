"""A wheel for each target, with the kernel compiled for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def workshop() -> Iterator[Path]:
    """A folder with a copy of the checkout, for libraries of other systems, and with what the build requires."""
    with tempfile.TemporaryDirectory(prefix="bloomdesk-wheels-") as name:
        place = Path(name)
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
        )
        for file in filter(None, listed.stdout.split("\0")):
            if (ROOT / file).is_file():
                copy = place / "source" / file
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / file, copy)
        required = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
        pip("install", "--target", place / "requirements", "-c", ROOT / "constraints.txt", *required)
        yield place


def build_wheel(place: Path, target: str, out: Path) -> Path:
    """The wheel for a target of runner/kernel/compiler.py, made in a `workshop` and put into the folder `out`."""
    with tempfile.TemporaryDirectory(dir=place) as made:
        paths = {"PYTHONPATH": str(place / "requirements"), "BLOOMDESK_TARGET": target}
        pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", made, place / "source", **paths)
        (wheel,) = Path(made).glob("*.whl")
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(wheel, out / wheel.name))


def pip(*arguments: str | Path, **environment: str) -> None:
    command: Sequence[str | Path] = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise RuntimeError(f"pip {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}")
