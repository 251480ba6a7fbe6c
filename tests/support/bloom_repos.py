"""Small repositories in the Hub's layouts, for tests that download them; the weights are noise."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import time
from pathlib import Path

from scripts.fakehub.server import LocalHub
from toolkit.hub.record import RECORD, load_record

NAME = "someone/bloom-small"
BLOOM = "bigscience/bloom"
COMMIT = "2a3d62e072b65c210f519263339144a9428db0f4"
SHARD = 300_000
# The only file of a small repository.
FILE = "model.safetensors"
RANGE, WINDOW = 16_384, 131_072
SHARDS = tuple(f"pytorch_model_0000{number}-of-00003.bin" for number in (1, 2, 3))
SMALL = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
BIN_INDEX = "pytorch_model.bin.index.json"
NEEDED = (*SMALL, BIN_INDEX, *SHARDS)
# The shard that tests let something happen to.
VICTIM = SHARDS[1]


def noise(seed: object, size: int) -> bytes:
    return random.Random(repr(seed)).randbytes(size)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_index(path: Path, names: list[str] | tuple[str, ...]) -> None:
    weight_map = {f"tensor.{number}": name for number, name in enumerate(names)}
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_small_files(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name in SMALL:
        (directory / name).write_bytes(json.dumps({"file": name, "about": str(noise(name, 200))}).encode())


def write_bin_repo(directory: Path, shards: tuple[str, ...] = SHARDS) -> Path:
    """The layout of bigscience/bloom: .bin shards, and much that a download must leave alone."""
    write_small_files(directory)
    for name in shards:
        (directory / name).write_bytes(noise(name, SHARD))
    write_index(directory / BIN_INDEX, shards)
    (directory / "README.md").write_text("# a model")
    logs = directory / "tensorboard" / "main"
    logs.mkdir(parents=True)
    for number in range(5):
        (logs / f"events.out.tfevents.{number}").write_bytes(noise(number, 1000))
    return directory


def add_safetensors(directory: Path, count: int = 2) -> tuple[str, ...]:
    """A second copy of the weights beside the first."""
    names = tuple(f"model_0000{number}-of-0000{count}.safetensors" for number in range(1, count + 1))
    for name in names:
        (directory / name).write_bytes(noise(name, 5000))
    write_index(directory / "model.safetensors.index.json", names)
    return names


def write_pins(directory: Path, repo: Path, name: str, commit: str) -> None:
    """A table of pins in the form of the shipped one, for the needed files of `repo`."""
    files = {path: [(repo / path).stat().st_size, sha256((repo / path).read_bytes())] for path in NEEDED}
    directory.mkdir(exist_ok=True)
    body = {"repo": name, "commit": commit, "files": files}
    (directory / "bigscience_bloom.json").write_text(json.dumps(body))


def assert_whole(target: Path, repo: Path, names: tuple[str, ...] = NEEDED) -> None:
    """The download in `target` holds just these files of `repo`, and its record knows them."""
    assert {path.name for path in target.iterdir()} == {*names, RECORD}
    record = load_record(target)
    assert record.missing_in(target) == ()
    for name in names:
        data = (target / name).read_bytes()
        assert data == (repo / name).read_bytes()
        assert record.files[name].sha256 == sha256(data)


def fetched(local: LocalHub) -> set[str]:
    """The weights and small files whose bytes were asked for."""
    paths = {
        each.path for each in local.requests if each.method == "GET" and not each.path.startswith("/api")
    }
    return {path.rpartition("/")[2] for path in paths}


def ranges(local: LocalHub, name: str) -> list[str | None]:
    """The Range header of each request for the bytes of a large file."""
    return [each.headers.get("range") for each in local.asked("GET", name) if each.server == "cdn"]


def wait_for_bytes(path: Path, nbytes: int, writer: subprocess.Popen) -> None:
    """Wait until the process has written that many bytes of a file."""
    deadline = time.monotonic() + 30
    while not path.exists() or path.stat().st_size < nbytes:
        assert time.monotonic() < deadline and writer.poll() is None
        time.sleep(0.01)
