"""Checkpoints that several tests share, made once: a source in the Hub's form, and what `convert` makes of it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from runner.format.coded import LOSSLESS
from runner.weights import chunks
from scripts.fakehub import checkpoint as make_checkpoint
from tests.support.bounded import Bounded
from tests.support.lossless import make as make_source
from tests.support.lossless import make_forms
from tests.support.streaming import Shelf, arrangement, logits_of, make_shelf, opened
from toolkit.commands.convert import convert

# For tensors this small, more threads only wait for each other; here, and in the processes that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell that starts the tests in the background has them ignore Ctrl-C, and what they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

PreparedFactory = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedFactory:
    """`prepared(dtype=..., heads=..., hidden_size=...)` -> (source, prepared directory); do not change them."""
    made: dict[tuple, tuple[Path, Path]] = {}

    def make(
        *, dtype: str = "bfloat16", heads: int = 6, hidden_size: int = 96, **shape: int
    ) -> tuple[Path, Path]:
        key = (dtype, heads, hidden_size, *sorted(shape.items()))
        if key not in made:
            source = tmp_path_factory.mktemp("source")
            sizes = {"blocks": 3, "vocab_size": 1200, **shape}
            make_checkpoint.synthetic(source, hidden_size=hidden_size, heads=heads, dtype=dtype, **sizes)
            directory = tmp_path_factory.mktemp("prepared") / "bloom"
            convert(source, directory)
            made[key] = source, directory
        return made[key]

    return make


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small complete prepared directory of three blocks; copy it before changing it."""
    base = tmp_path_factory.mktemp("made")
    make_checkpoint.synthetic(base / "source", hidden_size=64, heads=8, blocks=3, vocab_size=300)
    convert(base / "source", base / "out")
    return base / "out"


@pytest.fixture
def made_copy(made: Path, tmp_path: Path) -> Path:
    """A complete prepared directory of the test's own."""
    return Path(shutil.copytree(made, tmp_path / "made"))


@pytest.fixture(scope="session")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source`, and a prepared directory of each form, named after it; copy them before changing them."""
    return make_forms(tmp_path_factory.mktemp("forms"))


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(source of 72 shards, prepared directory) of the trained miniature."""
    source = tmp_path_factory.mktemp("miniature") / "source"
    make_checkpoint.miniature(source)
    directory = source.parent / "bloom"
    convert(source, directory)
    return source, directory


@pytest.fixture(scope="session")
def draft(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(source of one safetensors file, prepared directory) of the draft that was trained beside the miniature."""
    source = tmp_path_factory.mktemp("draft") / "source"
    make_checkpoint.draft(source)
    directory = source.parent / "draft"
    convert(source, directory)
    return source, directory


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return make_shelf(tmp_path / "part.safetensors")


@pytest.fixture(scope="session")
def logits_in_ram(prepared) -> Callable[[Path], torch.Tensor]:
    """Logits with everything resident and matrices in one chunk each."""
    known: dict[Path, torch.Tensor] = {}

    def of(directory: Path) -> torch.Tensor:
        if directory not in known:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(chunks, "LARGEST_CHUNK", 2**40)
                model = opened(directory)
            known[directory] = logits_of(model, *arrangement(model.weights, "resident"))
            assert known[directory].isfinite().all()
        return known[directory]

    return of


@pytest.fixture(scope="module")
def bounded() -> Iterator[Bounded]:
    reader = Bounded()
    yield reader
    reader.close()


@pytest.fixture(scope="session")
def coded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(source, lossless directory); copy it before changing it."""
    base = tmp_path_factory.mktemp("coded")
    convert(make_source(base / "source"), base / "out", form=LOSSLESS)
    return base / "source", base / "out"


@pytest.fixture
def coded_copy(coded: tuple[Path, Path], tmp_path: Path) -> Path:
    """A lossless directory of the test's own."""
    return Path(shutil.copytree(coded[1], tmp_path / "bloom"))


@pytest.fixture(autouse=True)
def only_slow_tests_start_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`scripts/test --quick` leaves out tests that are marked `slow`; all that start a process must be."""
    if request.node.get_closest_marker("slow") is None:

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("a test that starts a process is slow: mark it")

        monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
