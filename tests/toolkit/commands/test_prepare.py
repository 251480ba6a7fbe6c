"""Download and conversion shard by shard: the same result as one after the other, in less disk, at any interruption."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runner import BloomdeskError
from runner.format.manifest import load_manifest
from runner.system.lock import sole_writer
from scripts.fakehub.checkpoint import Layout, synthetic
from scripts.fakehub.server import Fault, LocalHub
from tests.support.bloom_repos import fetched, ranges, sha256
from tests.support.commands import started
from tests.support.lossless import content
from tests.support.oracle import plain_source, write_source
from tests.support.streaming import soon
from toolkit.commands.build import carry_out
from toolkit.commands.convert import convert
from toolkit.commands.download import download
from toolkit.commands.prepare import plan_preparation, prepare
from toolkit.commands.repair import repair
from toolkit.commands.schedule import Schedule
from toolkit.hub import retry, revision
from toolkit.parts.destination import STAGING, initialise
from toolkit.source.shards import HEAD_BYTES

REPO = "me/bloom"
SHAPE = {"hidden_size": 64, "heads": 8, "blocks": 6, "vocab_size": 700}
LAYOUTS = {
    "bloom": Layout(),
    "cut blocks": Layout(max_shard_bytes=130_000, separator="-"),
    "single bin": Layout(single=True),
    "single safetensors": Layout(single=True, form="safetensors"),
    "safetensors shards": Layout(form="safetensors"),
    "lm_head": Layout(lm_head=True, prefix=True),
}


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`serve(layout)` -> (hub, what an undisturbed download and conversion give)."""

    def start(layout: Layout = LAYOUTS["bloom"], **shape: object) -> tuple[LocalHub, dict[str, bytes]]:
        synthetic(tmp_path / "repo", **{**SHAPE, **shape}, layout=layout)
        hub = hubs.enter_context(LocalHub({REPO: tmp_path / "repo"}))
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setattr(retry, "BACKOFF", (0.01,) * 5)
        download(REPO, tmp_path / "source")
        convert(tmp_path / "source", tmp_path / "expected")
        return hub, content(tmp_path / "expected")

    with ExitStack() as hubs:
        yield start


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_result_is_that_of_download_and_convert(serve, tmp_path: Path, layout: Layout) -> None:
    _, expected = serve(layout)
    done = prepare(REPO, tmp_path / "out")
    assert content(tmp_path / "out") == expected
    assert len(done.written) == 8 and not done.kept
    again = prepare(REPO, tmp_path / "out")
    assert not again.written and len(again.kept) == 8 and again.received == 0
    assert content(tmp_path / "out") == expected


AS_FOUND = {
    "vectors in float32": lambda state: {key: t if t.dim() == 2 else t.float() for key, t in state.items()},
    "module. and a mask": lambda state: {
        **{f"module.{key}": tensor for key, tensor in state.items()},
        "module.h.0.self_attention.causal_mask": torch.ones(1, 1, 4, 4, dtype=torch.bool),
    },
    "a head of its own": lambda state: {**state, "lm_head.weight": state["word_embeddings.weight"] * 2},
    "under model": lambda state: {"model": state, "epoch": 3},
    "only the head": lambda state: {
        "lm_head.weight" if key == "word_embeddings.weight" else key: tensor for key, tensor in state.items()
    },
}


CONFIG = {"a head of its own": {"tie_word_embeddings": False}}


def test_a_head_that_only_its_values_tell_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = plain_source(tmp_path / "plain")
    write_source(
        tmp_path / "repo", tmp_path / "plain", AS_FOUND["a head of its own"](state), pickle_protocol=2
    )
    with LocalHub({REPO: tmp_path / "repo"}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        with pytest.raises(BloomdeskError, match="differs from the embedding") as caught:
            prepare(REPO, tmp_path / "out")
        assert "bloomdesk download" in caught.value.hint
        download(REPO, tmp_path / "source")
        convert(tmp_path / "source", tmp_path / "made")
        part = tmp_path / "made" / "head.safetensors"
        sound = part.read_bytes()
        part.unlink()
        repair(tmp_path / "made")
    assert part.read_bytes() == sound


@pytest.mark.parametrize("dtype", [None, "F16"])
@pytest.mark.parametrize("form", AS_FOUND)
def test_sources_as_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, dtype: str | None
) -> None:
    state = plain_source(tmp_path / "plain")
    write_source(
        tmp_path / "repo", tmp_path / "plain", AS_FOUND[form](state), CONFIG.get(form), pickle_protocol=2
    )
    with LocalHub({REPO: tmp_path / "repo"}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        download(REPO, tmp_path / "source")
        expected = convert(tmp_path / "source", tmp_path / "expected", dtype=dtype)
        done = prepare(REPO, tmp_path / "out", dtype=dtype)
    assert content(tmp_path / "out") == content(tmp_path / "expected")
    assert done.notes == expected.notes


@pytest.mark.parametrize(
    ("dtype", "layout", "fault"),
    [
        ("F16", "bloom", Fault(times=0)),
        ("F32", "single safetensors", Fault(drop_after=50, times=2)),
        ("BF16", "safetensors shards", Fault(ignore_range=True, times=1)),
        ("F16", "single bin", Fault(ignore_range=True, times=1)),
    ],
)
def test_the_dtype_is_read_from_the_first_bytes_of_one_shard(
    serve, tmp_path: Path, dtype: str, layout: str, fault: Fault
) -> None:
    names = {"F16": "float16", "F32": "float32", "BF16": "bfloat16"}
    hub, expected = serve(LAYOUTS[layout], dtype=names[dtype])
    shard = min(name for name in content(tmp_path / "repo") if name.endswith((".bin", ".safetensors")))
    hub.fail(shard, fault)
    hub.requests.clear()
    plan = plan_preparation(REPO, tmp_path / "out")
    assert plan.manifest.model.dtype == dtype and not (tmp_path / "out").exists()
    nbytes = min(HEAD_BYTES, (tmp_path / "repo" / shard).stat().st_size)
    assert {each.rpartition("-")[2] for each in ranges(hub, shard)} == {str(nbytes - 1)}
    assert len(ranges(hub, shard)) == 1 + (fault.drop_after is not None) * 2
    assert fetched(hub).isdisjoint(set(plan.schedule.shards) - {shard})
    carry_out(plan)
    assert content(tmp_path / "out") == expected


@pytest.mark.parametrize("layout", ["bloom", "cut blocks", "single bin"])
def test_the_disk_holds_no_more_than_was_planned(serve, tmp_path: Path, layout: str) -> None:
    serve(LAYOUTS[layout])
    plan = plan_preparation(REPO, tmp_path / "out")
    shards = sorted(plan.schedule.shard_sizes[name] for name in plan.schedule.shards)
    peak = _peak_while(tmp_path / "out", lambda: carry_out(plan))
    small = sum(len(data) for data in plan.companions.values())
    manifests = 3 * (tmp_path / "out" / "manifest.json").stat().st_size + 16384
    assert peak <= plan.peak_bytes + small + manifests
    if plan.schedule.shards_at_a_time <= 2:
        assert plan.peak_bytes <= plan.bytes_to_write + sum(shards[-2:])


def _peak_while(directory: Path, work: Callable[[], object]) -> int:
    """The most bytes that files below `directory` had while `work` ran."""
    peak, over = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not over.is_set():
            peak = max(peak, sum(size for _, size, _ in _files_below(directory)))
            time.sleep(0.001)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        work()
    finally:
        over.set()
        sampler.join()
    return peak


def _files_below(directory: Path) -> set[tuple[str, int, int]]:
    """(name, size, time of change) of each file."""
    found = set()
    for folder, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):
                state = Path(folder, name).stat()
                found.add((name, state.st_size, state.st_mtime_ns))
    return found


def test_blocks_that_are_cut_need_more_shards_at_a_time_and_it_is_known_before() -> None:
    sizes = {"a": 10, "b": 20, "c": 30, "d": 40}
    parts = {"embedding": 10, "block": 45, "last": 45}
    whole = Schedule({"embedding": ("a",), "block": ("b",), "last": ("c",)}, parts, sizes)
    assert (whole.peak_bytes, whole.shards_at_a_time) == (100 + 30, 2)
    cut = Schedule({"embedding": ("a",), "block": ("b", "c", "d"), "last": ("d",)}, parts, sizes)
    assert cut.shards == ("a", "b", "c", "d")
    assert (cut.peak_bytes, cut.shards_at_a_time) == (55 + 90, 3)


def test_a_disk_that_is_too_small_is_refused_with_the_figures(
    serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve()
    monkeypatch.setattr("toolkit.parts.destination.free_bytes", lambda _: 12_345)
    with pytest.raises(BloomdeskError, match=r"needs [\d,]+ bytes and the disk has 12,345 free"):
        plan_preparation(REPO, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_conversion_ends_the_download(serve, tmp_path: Path) -> None:
    """A shard that is sound for the Hub and no BLOOM: the error comes, and no thread stays."""
    hub, _ = serve()
    repo = tmp_path / "repo"
    data = (repo / "pytorch_model_00004-of-00008.bin").read_bytes()
    (repo / "pytorch_model_00003-of-00008.bin").write_bytes(data)
    hub.close()
    before = threading.active_count()
    with LocalHub({REPO: repo}) as hub:
        os.environ["HF_ENDPOINT"] = hub.endpoint
        with pytest.raises(BloomdeskError, match=r"00003-of-00008\.bin"):
            prepare(REPO, tmp_path / "out")
    assert threading.active_count() <= before
    assert list(load_manifest(tmp_path / "out").parts) == ["embedding.safetensors", "block_00.safetensors"]


def test_a_corrupt_shard_never_counts(serve, tmp_path: Path) -> None:
    hub, expected = serve()
    hub.fail("pytorch_model_00003-of-00008.bin", Fault(flip=50_000, times=1))
    with pytest.raises(BloomdeskError, match="came damaged"):
        prepare(REPO, tmp_path / "out")
    assert "block_01.safetensors" not in load_manifest(tmp_path / "out").parts
    prepare(REPO, tmp_path / "out")
    assert content(tmp_path / "out") == expected


@pytest.mark.slow
def test_the_dtype_of_parts_or_pins_needs_no_request(
    serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, expected = serve(dtype="float16")
    prepare(REPO, tmp_path / "out")
    (tmp_path / "out" / "block_01.safetensors").unlink()
    repo = content(tmp_path / "repo")
    files = {name: (len(data), sha256(data)) for name, data in repo.items()}
    body = {"commit": load_manifest(tmp_path / "out").source.commit, "dtype": "F16", "files": files}
    (tmp_path / "pins.json").write_text(json.dumps(body))
    hub.requests.clear()
    assert plan_preparation(REPO, tmp_path / "out").manifest.model.dtype == "F16"
    with monkeypatch.context() as pinned:
        pinned.setattr(revision, "PINS", tmp_path)
        pinned.setattr(revision, "PINNED", {REPO: "pins.json"})
        assert plan_preparation(REPO, tmp_path / "other").manifest.model.dtype == "F16"
    assert not [name for name in fetched(hub) if name.endswith(".bin")]
    with monkeypatch.context() as offline:
        offline.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(BloomdeskError, match="offline mode is on"):
            plan_preparation(REPO, tmp_path / "other")
    prepare(REPO, tmp_path / "out")
    assert content(tmp_path / "out") == expected


def test_a_guessed_dtype_without_parts_is_replaced(serve, tmp_path: Path) -> None:
    _, expected = serve(dtype="float16")
    plan = plan_preparation(REPO, tmp_path / "out")
    guessed = replace(plan.manifest, model=replace(plan.manifest.model, dtype="BF16"))
    (tmp_path / "out").mkdir()
    initialise(tmp_path / "out", guessed, plan.companions)
    prepare(REPO, tmp_path / "out")
    assert content(tmp_path / "out") == expected


@pytest.mark.slow
def test_another_repo_or_commit_is_refused(serve, tmp_path: Path) -> None:
    hub, _ = serve()
    prepare(REPO, tmp_path / "out")
    hub.close()
    (tmp_path / "repo" / "README.md").write_text("another commit")
    with LocalHub({REPO: tmp_path / "repo", "me/other": tmp_path / "repo"}) as hub:
        os.environ["HF_ENDPOINT"] = hub.endpoint
        with pytest.raises(BloomdeskError, match="was started from another source"):
            plan_preparation(REPO, tmp_path / "out", "main")
        with pytest.raises(BloomdeskError, match="was started from another source"):
            plan_preparation("me/other", tmp_path / "out")


def test_a_second_writer_is_refused(serve, tmp_path: Path) -> None:
    serve()
    plan = plan_preparation(REPO, tmp_path / "out")
    (tmp_path / "out").mkdir()
    with sole_writer(tmp_path / "out"), pytest.raises(BloomdeskError, match="another bloomdesk is writing"):
        carry_out(plan)
    assert not list((tmp_path / "out").iterdir())


def test_a_directory_of_another_format_version_is_refused(serve, tmp_path: Path) -> None:
    serve()
    prepare(REPO, tmp_path / "out")
    manifest = tmp_path / "out" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 6'))
    with pytest.raises(BloomdeskError, match="format version 6, this program reads 1"):
        plan_preparation(REPO, tmp_path / "out")


@pytest.mark.slow
def test_kills_at_random_are_resumed(serve, tmp_path: Path) -> None:
    """SIGKILL at random moments, with drops on the line, until it is through: byte for byte the undisturbed result."""
    hub, expected = serve()
    for name in plan_preparation(REPO, tmp_path / "out").schedule.shards[::2]:
        hub.fail(name, Fault(drop_after=40_000, times=2))
    chance = random.Random(7)
    kills = 0
    for _ in range(40):
        with started("prepare", REPO, tmp_path / "out") as process:
            if kills < 4:
                before = _files_below(tmp_path / "out")
                while process.poll() is None and _files_below(tmp_path / "out") == before:
                    time.sleep(0.005)
                time.sleep(chance.uniform(0, 0.4))
                process.send_signal(signal.SIGKILL)
            _, said = process.communicate(timeout=120)
        kills += process.returncode == -signal.SIGKILL
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, said
    assert process.returncode == 0
    assert kills == 4
    assert content(tmp_path / "out") == expected


@pytest.mark.slow
def test_an_interrupt_ends_quickly_and_keeps_what_arrived(serve, tmp_path: Path) -> None:
    hub, expected = serve()
    hub.fail("pytorch_model_00005-of-00008.bin", Fault(stall=5.0, drop_after=10_000, times=1))
    with started("prepare", REPO, tmp_path / "out", "--connections", "1") as process:
        staged = tmp_path / "out" / STAGING / "pytorch_model_00005-of-00008.bin.incomplete"
        soon(staged.exists)
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert time.monotonic() - start < 4.5
    prepare(REPO, tmp_path / "out")
    assert content(tmp_path / "out") == expected
