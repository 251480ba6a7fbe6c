"""One slice from the Hub: only the bytes of its rows come, and give what `convert --slice` makes of whole shards."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runner.errors import BloomdeskError
from runner.format.manifest import load_manifest
from runner.format.slices import Slice, even
from scripts.fakehub.checkpoint import Layout
from scripts.fakehub.server import Fault, LocalHub, Repo
from tests.support.commands import refused, run, started
from tests.support.lossless import content, flip, make
from tests.support.oracle import plain_source, write_source
from tests.support.streaming import soon
from toolkit.commands.convert import convert
from toolkit.commands.download import download
from toolkit.commands.export import export
from toolkit.commands.prepare import prepare
from toolkit.commands.repair import repair
from toolkit.commands.verify import verify
from toolkit.hub import excerpts, retry
from toolkit.parts.destination import STAGING
from toolkit.source import excerpt
from toolkit.source.shards import read_shard

REPO = "me/bloom"
SHAPE = {"hidden_size": 128, "heads": 8, "blocks": 2, "vocab_size": 500}
LAYOUTS = {
    "bin": Layout(),
    "cut blocks": Layout(max_shard_bytes=130_000, separator="-", form="safetensors"),
    "single bin": Layout(single=True),
    "lm_head": Layout(lm_head=True, prefix=True),
}
# Bytes of the first shard that show the dtype, and the most bytes that describe the tensors of a shard.
HEAD = 16_384
OWN = Slice(1, (2, 1, 1))
# Of 8 heads none: it has no row of query_key_value.
WITHOUT_HEADS = Slice(4, even(9))
BLOCK, SHARD = "block_01.safetensors", "pytorch_model_00003-of-00004.bin"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The repository of a layout, which tests may not change."""
    made: dict[str, Path] = {}

    def of(layout: str = "bin") -> Path:
        if layout not in made:
            made[layout] = make(tmp_path_factory.mktemp("repo") / "repo", LAYOUTS[layout], **SHAPE)
        return made[layout]

    return of


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], LocalHub]]:
    hubs: list[LocalHub] = []

    def start(directory: Path) -> LocalHub:
        # The commit stays, whatever becomes of the files.
        hubs.append(LocalHub({REPO: Repo(directory, commit="2a3d62e072b65c210f519263339144a9428db0f4")}))
        hubs[-1].__enter__()
        monkeypatch.setenv("HF_ENDPOINT", hubs[-1].endpoint)
        return hubs[-1]

    monkeypatch.setattr(retry, "BACKOFF", (0.0,) * 3)
    monkeypatch.setattr(excerpt, "LARGEST_GAP", 512)
    monkeypatch.setattr("toolkit.commands.prepare.HEAD_BYTES", HEAD)
    yield start
    for hub in hubs:
        hub.close()


@pytest.fixture
def hub(serve: Callable[[Path], LocalHub], sources: Callable[[str], Path]) -> LocalHub:
    return serve(sources())


@pytest.fixture(scope="module")
def converted(sources: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `convert --slice` makes of whole shards."""
    directory = tmp_path_factory.mktemp("expected") / "out"
    convert(sources(), directory, own=OWN)
    return directory


@pytest.fixture(scope="module")
def expected(converted: Path) -> dict[str, bytes]:
    return parts_of(converted)


def parts_of(directory: Path) -> dict[str, bytes]:
    return {name: data for name, data in content(directory).items() if not name.startswith("manifest")}


def served(hub: LocalHub) -> int:
    """Bytes of shards that were asked for, all of them by range."""
    files = [each for each in hub.requests if each.server == "cdn" and not each.path.endswith(".json")]
    asked = [re.fullmatch(r"bytes=(\d+)-(\d+)", each.headers.get("range", "")) for each in files]
    return sum(int(each[2]) + 1 - int(each[1]) for each in asked)


def own_bytes(directory: Path) -> int:
    """Bytes of the tensors of a slice, in the model's dtype."""
    manifest = load_manifest(directory)
    return sum(spec.nbytes(manifest.model.dtype) for spec in manifest.specs)


@pytest.mark.parametrize(
    ("layout", "form", "own"),
    [
        ("bin", "plain", OWN),
        ("cut blocks", "int4", WITHOUT_HEADS),
        ("single bin", "plain", WITHOUT_HEADS),
        ("lm_head", "lossless", OWN),
    ],
)
def test_only_the_bytes_of_its_rows_come(
    serve, sources, tmp_path: Path, layout: str, form: str, own: Slice
) -> None:
    hub, out = serve(sources(layout)), tmp_path / "out"
    done = prepare(REPO, out, own=own, form=form)
    shards = [path for path in sources(layout).iterdir() if path.suffix in (".bin", ".safetensors")]
    convert(sources(layout), tmp_path / "expected", own=own, form=form)
    assert parts_of(out) == parts_of(tmp_path / "expected") and verify(out).sound
    assert done.received <= served(hub) <= done.received + HEAD
    # The head must equal the embedding, so its rows come, too.
    head = 2 * 500 * 128 if layout == "lm_head" else 0
    assert own_bytes(out) <= served(hub) <= own_bytes(out) + head + HEAD * (3 + 2 * len(shards))
    assert served(hub) < 0.5 * sum(path.stat().st_size for path in shards)
    manifest, whole = load_manifest(out), load_manifest(tmp_path / "expected")
    assert set(manifest.unproven_shards) == {path.name for path in shards} and not whole.unproven_shards
    assert manifest.source.commit and sum("--check-whole" in note for note in done.notes) == 1
    for file, record in manifest.parts.items():
        assert not record.wholes and record.source_rows == whole.parts[file].source_rows
    hub.requests.clear()
    assert not prepare(REPO, out, own=own, form=form).written and not hub.requests


@pytest.mark.parametrize("form", ["lossless", "int8"])
def test_all_slices_are_exported_as_the_whole_is(hub, sources, tmp_path: Path, form: str) -> None:
    found = [tmp_path / str(index) for index in range(2)]
    for index, directory in enumerate(found):
        prepare(REPO, directory, own=Slice(index, (2, 1)), form=form)
    prepare(REPO, tmp_path / "whole", form=form)
    export(found[1], tmp_path / "hub", also=found[:1])
    export(tmp_path / "whole", tmp_path / "expected")
    assert content(tmp_path / "hub") == content(tmp_path / "expected")


def test_it_goes_on_from_the_last_sound_block(hub, tmp_path: Path, expected, monkeypatch) -> None:
    monkeypatch.setattr(excerpts, "BLOCK", 2**14)
    rows = tmp_path / "out" / STAGING / (SHARD + excerpts.SUFFIX)

    def stop(file: str, done: int, total: int) -> None:
        if file == SHARD and done > 60_000:
            raise KeyboardInterrupt

    monkeypatch.setattr("toolkit.io.progress.SECONDS_BETWEEN_REPORTS", 0.0)
    hub.fail(SHARD, Fault(since=100_000, stall=0.3, times=1))
    with pytest.raises(KeyboardInterrupt):
        prepare(REPO, tmp_path / "out", progress=stop, own=OWN)
    begun = rows.stat().st_size
    assert begun > 60_000
    # A power loss has left something else in the place of a block.
    flip(rows, 2**15 + 5)
    assert prepare(REPO, tmp_path / "out", own=OWN).resumed == 2**15
    assert parts_of(tmp_path / "out") == expected


@pytest.mark.slow
def test_a_killed_command_goes_on(sources, tmp_path: Path, expected, monkeypatch) -> None:
    out, options = tmp_path / "out", ("--slice", "2/3", "--shares", "2,1,1")
    with LocalHub({REPO: sources()}, rate=300_000) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        for sign in (STAGING, "embedding.safetensors"):
            with started("prepare", REPO, out, *options, "--connections", "1") as process:
                soon(lambda sign=sign: (out / sign).exists() or process.poll() is not None)
                process.send_signal(signal.SIGKILL)
            assert not (out / "final_layernorm.safetensors").exists()
        hub.rate = None
        assert run("prepare", REPO, out, *options).returncode == 0
    assert parts_of(out) == expected and verify(out).sound


def test_a_shard_that_changes_on_the_hub_is_told(serve, tmp_path: Path) -> None:
    make(tmp_path / "repo", **SHAPE)
    serve(tmp_path / "repo")

    def change(file: str, done: int, total: int) -> None:
        if file == SHARD and done == total:
            flip(tmp_path / "repo" / SHARD, -2000)

    with pytest.raises(BloomdeskError, match=f"{SHARD} of {REPO} is another file: its sha256 should be"):
        prepare(REPO, tmp_path / "out", progress=change, own=OWN)
    assert BLOCK not in load_manifest(tmp_path / "out").parts
    # What had come of the old one is not gone on with, nor mixed with parts of it.
    assert prepare(REPO, tmp_path / "out", own=OWN).written[0] == BLOCK
    flip(tmp_path / "repo" / SHARD, -2000)
    (tmp_path / "out" / BLOCK).unlink()
    with pytest.raises(BloomdeskError, match=f"is not what {BLOCK} was made from"):
        prepare(REPO, tmp_path / "out", own=OWN)


def places(shard: Path, own: Slice) -> tuple[int, int]:
    """A byte of a block's shard that is in the rows of a slice, and one that is not."""
    (tensor,) = (each for key, each in read_shard(shard).items() if key.endswith("dense_h_to_4h.weight"))
    rows, row = own.rows(tensor.shape[0], 12), tensor.nbytes // tensor.shape[0]
    return tensor.offset + row * rows.start + 7, tensor.offset + row * (rows.stop + 60) + 7


def test_reading_all_through_finds_a_byte_outside_of_the_rows(
    hub, sources, tmp_path: Path, converted: Path
) -> None:
    out = tmp_path / "out"
    prepare(REPO, out, own=OWN)
    _, outside = places(sources() / SHARD, OWN)
    for each in (out, tmp_path / "fresh"):
        hub.faults.clear()
        hub.fail(SHARD, Fault(flip=outside))
        with pytest.raises(BloomdeskError, match=f"{SHARD} of {REPO} came damaged: its sha256 should be"):
            prepare(REPO, each, own=OWN, check_whole=True)
        hub.faults.clear()
        states = {path.name: path.stat().st_mtime_ns for path in each.glob("*.safetensors")}
        done = prepare(REPO, each, own=OWN, check_whole=True)
        # It has seen the whole matrices, too.
        assert load_manifest(each).parts == load_manifest(converted).parts and verify(each).sound
        # What is there is compared, and stays.
        assert (
            states.items()
            <= {path.name: path.stat().st_mtime_ns for path in each.glob("*.safetensors")}.items()
        )
        assert not {*done.written} & {*states} and "have the Hub's sha256" in done.notes[0]
        hub.requests.clear()
        assert not prepare(REPO, each, own=OWN, check_whole=True).received and not hub.requests


def test_a_part_of_damaged_rows_is_named_and_made_anew(hub, sources, tmp_path: Path, expected) -> None:
    out = tmp_path / "out"
    inside, _ = places(sources() / SHARD, OWN)
    hub.fail(SHARD, Fault(flip=inside))
    prepare(REPO, out, own=OWN)
    hub.faults.clear()
    with pytest.raises(BloomdeskError, match=f"{BLOCK} was made from other bytes") as caught:
        prepare(REPO, out, own=OWN, check_whole=True)
    assert f"delete {BLOCK}" in caught.value.hint
    (out / BLOCK).unlink()
    assert prepare(REPO, out, own=OWN, check_whole=True).written == (BLOCK,)
    assert parts_of(out) == expected and not load_manifest(out).unproven_shards


def test_rows_that_do_not_lie_together(serve, tmp_path: Path) -> None:
    state = plain_source(tmp_path / "plain")
    key = next(key for key in state if key.endswith("0.mlp.dense_h_to_4h.weight"))
    state[key] = state[key].T.contiguous().T
    write_source(tmp_path / "repo", tmp_path / "plain", state, pickle_protocol=2)
    serve(tmp_path / "repo")
    done = prepare(REPO, tmp_path / "out", own=OWN)
    convert(tmp_path / "repo", tmp_path / "expected", own=OWN)
    assert parts_of(tmp_path / "out") == parts_of(tmp_path / "expected")
    assert sum("rows of 1 tensors do not lie together" in note for note in done.notes) == 1


def test_a_store_without_ranges_gives_whole_shards(hub, tmp_path: Path, expected) -> None:
    for number in range(1, 5):
        hub.fail(f"pytest_model_0000{number}-of-00004.bin", Fault())
        hub.fail(f"pytorch_model_0000{number}-of-00004.bin", Fault(ignore_range=True))
    done = prepare(REPO, tmp_path / "out", own=OWN)
    assert parts_of(tmp_path / "out") == expected and not (tmp_path / "out" / STAGING).exists()
    assert not load_manifest(tmp_path / "out").unproven_shards
    assert [note for note in done.notes if "4 shards came whole" in note]


@pytest.mark.parametrize("damaged", [None, 3, -2000])
def test_what_the_cache_has_is_proven(
    hub, sources, tmp_path: Path, expected, monkeypatch, damaged: int | None
) -> None:
    folder = tmp_path / "cache" / "models--me--bloom" / "snapshots" / hub.repos[REPO].commit
    folder.mkdir(parents=True)
    (folder / SHARD).write_bytes((sources() / SHARD).read_bytes())
    if damaged is not None:
        flip(folder / SHARD, damaged)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    done = prepare(REPO, tmp_path / "out", own=OWN)
    assert parts_of(tmp_path / "out") == expected and bool(done.cached) == (damaged is None)
    assert (SHARD in load_manifest(tmp_path / "out").unproven_shards) == (damaged is not None)
    assert bool(hub.asked("GET", SHARD)) == (damaged is not None)


def test_it_is_repaired_and_gone_on_with(hub, sources, tmp_path: Path, expected) -> None:
    out = tmp_path / "out"
    download(REPO, tmp_path / "source")
    prepare(REPO, out, own=OWN, form="int8")
    before = content(out)
    for source in (None, tmp_path / "source"):
        flip(out / BLOCK, -1)
        hub.requests.clear()
        assert repair(out, source).parts == (BLOCK,)
        assert content(out) == before
        assert {each.path.rpartition("/")[2] for each in hub.requests if each.server == "cdn"} <= {SHARD}
    (out / BLOCK).unlink()
    assert convert(tmp_path / "source", out, own=OWN, form="int8").written == (BLOCK,)
    assert content(out) == before
    (out / BLOCK).unlink()
    shard = tmp_path / "source" / "pytorch_model_00002-of-00004.bin"
    flip(shard, places(shard, OWN)[0])
    with pytest.raises(BloomdeskError, match="made from another state of the source"):
        convert(tmp_path / "source", out, own=OWN, form="int8")


def test_a_shape_that_is_not_the_models_is_told(serve, tmp_path: Path) -> None:
    make(tmp_path / "repo", **SHAPE)
    config = json.loads((tmp_path / "repo" / "config.json").read_text())
    (tmp_path / "repo" / "config.json").write_text(json.dumps({**config, "vocab_size": 400}))
    serve(tmp_path / "repo")
    with pytest.raises(BloomdeskError, match=r"has 500 rows, and config\.json's vocab_size is 400"):
        prepare(REPO, tmp_path / "out", own=OWN)


@pytest.mark.parametrize("beside", [None, "{}"])
def test_files_of_others_stay(hub, tmp_path: Path, beside: str | None) -> None:
    rows = tmp_path / "out" / STAGING / (SHARD + excerpts.SUFFIX)
    rows.parent.mkdir(parents=True)
    rows.write_bytes(b"mine")
    if beside is not None:
        rows.with_name(SHARD + excerpts.RECORD_SUFFIX).write_text(beside)
    with pytest.raises(BloomdeskError, match=f"not from this program: {SHARD}.rows"):
        prepare(REPO, tmp_path / "out", own=OWN)
    assert rows.read_bytes() == b"mine"


def test_the_command_says_what_was_compared(hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "--check-whole is for a --slice" in refused("prepare", REPO, out, "--check-whole")
    done = run("prepare", REPO, out, "--slice", "1/2")
    assert done.returncode == 0 and "of 4 shards only the rows of slice 1/2 came" in done.stderr
    assert "rows of 4 shards, whose sha256 was not compared" in run("info", out).stdout
    assert json.loads(run("info", out, "--json").stdout)["unproven_shards"]
    (out / BLOCK).unlink()
    command = load_manifest(out).command(out)
    assert command == f"bloomdesk prepare {REPO} {out} --slice 1/2"
    # What came alone can't be compared with the whole matrices that another directory records.
    prepare(REPO, tmp_path / "whole")
    error = refused("convert", tmp_path / "whole", out, "--slice", "1/2")
    assert "came from the Hub without the rest" in error and command in error
    assert run("prepare", REPO, out, "--slice", "1/2", "--check-whole").returncode == 0
    assert "made from" not in run("info", out).stdout
