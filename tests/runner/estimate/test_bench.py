"""`bloomdesk bench` and `bloomdesk plan`: fields that agree with each other, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import runner
from runner import BloomdeskError
from runner.cli.bench import bench as bench_command
from runner.cli.plan import plan as plan_command
from runner.estimate import bench as bench_module
from runner.estimate import forecast, rates
from runner.estimate import plan as plan_module
from runner.format.manifest import load_manifest
from runner.format.slices import Slice, even
from runner.generation.model import Model
from runner.generation.speculation.draft_model import DraftModel
from runner.system import files, memory, platform
from runner.units import size
from tests.support.commands import refused, run, started
from toolkit.commands.convert import convert
from toolkit.parts.destination import write_manifest

RATES = rates.Rates(disk=7e9, memory=40e9, compute=400e9, decoded=12e9, int8=14e9, int4=13e9)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the second that measuring memory and processor takes."""
    monkeypatch.setattr(rates, "MEMORY_BYTES", 2**22)
    monkeypatch.setattr(rates, "DISK_BYTES", 2**22)
    monkeypatch.setattr(rates, "LARGEST_CHUNK", 2**20)
    monkeypatch.setattr(rates, "SMALLEST_SCRATCH", 2**20)


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """RAM for about half of the small model, whatever the process takes."""
    monkeypatch.setattr("runner.weights.chunks.LARGEST_CHUNK", 50_000)
    opened = Model.open.__func__

    def open_half(cls: type[Model], directory: Path, ram: int | None, also: Sequence[Path] = ()) -> Model:
        model = opened(cls, directory, ram, also)
        plan = replace(model, ram=2**40).memory_plan(20, 16)
        request = plan.request
        taken = request.process + request.cache + request.activations + 48 * 2**20
        return replace(model, ram=taken + plan.resident_bytes // 2)

    monkeypatch.setattr(Model, "open", classmethod(open_half))


@pytest.mark.slow
def test_a_bench_in_ram_streams_nothing(prepared, quick) -> None:
    found = bench_module.bench(prepared()[1], None, tokens=3, prompt_tokens=5)
    run = found.run
    assert len(run.pass_seconds) == 3 and min(run.pass_seconds) > 0 < run.prompt_seconds
    assert sorted(run.pass_seconds)[1] == found.seconds_per_token
    assert run.streamed_bytes_per_pass == found.forecast.memory_plan.streamed_bytes == 0
    assert found.limit_seconds == found.forecast.weight_bytes / found.rates.memory
    assert run.peak_bytes is None or run.peak_bytes > run.process_bytes * 0.9


def test_a_bench_streams_what_was_forecast(prepared, quick, streamed) -> None:
    found = bench_module.bench(prepared()[1], None, tokens=4, prompt_tokens=16)
    run = found.run
    assert run.streamed_bytes_per_pass == found.forecast.memory_plan.streamed_bytes > 0
    assert found.limit_seconds >= run.streamed_bytes_per_pass / found.rates.disk
    assert run.stream_rate > 0 and run.waiting_seconds >= 0


def test_the_system_counts_what_was_streamed(prepared, quick, streamed) -> None:
    """The two agree but for whole pages, and for what is read ahead at the two ends."""
    directory = prepared()[1]
    if not _counted(directory / "embedding.safetensors"):
        pytest.skip("this system, or this file system, does not count reads past the page cache")
    tokens = 8
    found = bench_module.bench(directory, None, tokens=tokens, prompt_tokens=16)
    plan = found.forecast.memory_plan
    chunks = forecast.chunk_bytes(Model.open(directory, None).weights.model)
    difference = tokens * abs(found.run.bytes_read_per_token - found.run.streamed_bytes_per_pass)
    assert difference <= tokens * 2 * platform.PAGE * len(chunks) + plan.read_ahead


def _counted(path: Path) -> bool:
    before = memory.bytes_read_from_disk()
    try:
        with files.open_for_streaming(path, past_the_cache=True) as file:
            count = file.readinto(memory.anonymous(2**16))
    except OSError:
        return False
    return before is not None and memory.bytes_read_from_disk() - before >= count


def test_the_end_of_a_text_ends_no_bench(prepared, quick, monkeypatch: pytest.MonkeyPatch) -> None:
    run = bench_module.run(prepared()[1], None, 6, 3, None)
    forward = Model.forward

    def ending(self: Model, *given: object, **options: object) -> torch.Tensor:
        logits = forward(self, *given, **options).clone()
        logits[:, self.weights.model.eos_token_id] = 1e6
        return logits

    monkeypatch.setattr(Model, "forward", ending)
    assert len(bench_module.run(prepared()[1], None, 6, 3, None).pass_seconds) == len(run.pass_seconds) == 6


BENCH_KEYS = {
    "directory", "ram", "process_bytes", "prompt_tokens", "prompt_seconds", "pass_seconds", "bytes_read_per_token",
    "streamed_bytes_per_pass", "waiting_seconds", "stream_rate", "peak_bytes", "seconds_per_token", "limit_seconds",
    "percent_of_limit", "rates", "predicted_seconds_per_token", "predicted_prompt_seconds", "predicted_to_measured",
}  # fmt: skip


def test_bench_prints_json_or_aligned_rows(prepared, quick, capsys: pytest.CaptureFixture[str]) -> None:
    directory = prepared()[1]
    assert bench_command(directory, None, 2, 3, as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == BENCH_KEYS
    assert report["percent_of_limit"] == 100 * report["limit_seconds"] / report["seconds_per_token"]
    assert set(report["rates"]) == {"disk", "memory", "compute", "decoded", "int8", "int4", "disks"}
    assert bench_command(directory, "3GB", 2, 3) == 0
    text = capsys.readouterr().out
    assert "of the limit" in text and "of 3 GB" in text
    assert len({line.index(line.strip().split("  ")[1]) for line in text.splitlines()}) == 1  # aligned


def test_bench_refuses_too_little_ram_and_other_directories(prepared, quick, tmp_path: Path) -> None:
    with pytest.raises(BloomdeskError, match="of RAM are too little"):
        bench_command(prepared()[1], "10MB", 2, 3)
    with pytest.raises(BloomdeskError, match="not a prepared checkpoint"):
        bench_command(tmp_path, None, 2, 3)
    with pytest.raises(BloomdeskError, match="at least one token"):
        bench_module.bench(prepared()[1], None, 0, 3)


@pytest.mark.slow
def test_a_plan_for_a_prepared_directory_writes_nothing(
    prepared, quick, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = prepared()[1]
    before = sorted(directory.iterdir())
    assert plan_command(lambda model: 0, directory, tokens=4, prompt_tokens=8, as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["prepared"] and report["fits"] and report["model"]["n_layer"] == 3
    assert report["forecast"]["streamed_bytes_per_pass"] == 0
    assert sorted(directory.iterdir()) == before


PLAN_KEYS = {
    "directory", "prepared", "model", "free_bytes", "rates", "prompt_tokens", "tokens", "coding", "disk_bytes",
    "forecast", "others", "lossless", "int8", "int4", "advice", "bytes_to_prepare", "fits",
}  # fmt: skip
FORECAST_KEYS = {
    "ram", "process", "cache", "activations", "read_ahead", "resident_bytes", "streamed_bytes_per_pass",
    "limit_seconds", "seconds_per_token", "prompt_seconds",
}  # fmt: skip


@pytest.mark.slow
def test_a_plan_on_an_empty_directory_leaves_nothing(
    quick, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan_command(lambda model: 2**62, tmp_path, "16GB", as_json=True) == 1  # it does not fit
    report = json.loads(capsys.readouterr().out)
    assert set(report) == PLAN_KEYS and set(report["forecast"]) == FORECAST_KEYS
    assert not report["prepared"] and not report["fits"] and report["model"]["name"] == "bigscience/bloom"
    assert [each["ram"] for each in report["others"]] == [size * 10**9 for size in (1, 2, 4, 8, 16, 32)]
    for form in ("lossless", "int8", "int4"):
        assert set(report[form]) == {"coding", "disk_bytes", "forecast", "others"}
    assert report["int4"]["disk_bytes"] < 0.32 * report["disk_bytes"]
    assert report["int8"]["disk_bytes"] < 0.53 * report["disk_bytes"]
    assert report["coding"] == "plain" and report["advice"] in ("plain", "lossless")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_plan_prints_rows_and_a_table(quick, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    later = tmp_path / "not" / "yet"  # the disk is that of what is there
    assert plan_command(lambda model: 10**6, later, "2GB", "bloom-560m") == 0
    text = capsys.readouterr().out
    assert "it fits" in text and "bloom-560m" in text and "weights that stay" in text
    table = text.split("\n\n")[1].splitlines()
    assert 2 < len(table) < 6 and len({len(line) for line in table}) == 1  # in a few GB all of it stays
    streamed = table[0].index("streamed") + len("streamed")
    in_full = [line[:streamed].endswith(" 0 bytes") for line in table[1:]]
    assert in_full == [False] * (len(table) - 2) + [True]
    with pytest.raises(BloomdeskError, match="of RAM are too little"):
        plan_command(lambda model: 0, tmp_path, "100MB", "bloom-560m")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_plan_says_what_other_disks_would_give(
    quick, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = (lambda _: 0), tmp_path, "2GB", "bloom-1b7", 4, 4
    assert plan_command(*asked, disks="0.4GB/s, 200MB/s") == 0
    words = capsys.readouterr().out
    assert "     2 disks  400 MB/s and 200 MB/s, 600 MB/s together" in words
    assert re.search(
        r"^ +plain  .* a token, .* for the prompt; 2.3 GB and 1.15 GB of disk$", words, re.MULTILINE
    )
    assert plan_command(*asked, disks="0.4GB/s,200MB/s", as_json=True) == 0
    found = json.loads(capsys.readouterr().out)["disks"]
    streamed = found["plain"]["streamed_bytes_per_pass"]
    assert (found["shares"], found["bytes_per_second"]) == ([400, 200], 6e8)
    assert streamed and found["plain"]["limit_seconds"] == pytest.approx(streamed / 6e8)
    assert set(found) >= {"plain", "lossless", "int8", "int4"}
    with pytest.raises(BloomdeskError, match="'fast' is not a rate"):
        plan_command(*asked, disks="1GB/s,fast")


@pytest.mark.slow
def test_a_form_that_stays_as_a_whole_is_the_same_in_more_ram(quick, tmp_path: Path) -> None:
    found = plan_module.plan(tmp_path, 2**40, "bloom-560m", 16, 4)
    for form in (found.form, *found.others.values()):
        last = max(form.others)
        assert not form.others[last].memory_plan.streamed_bytes
        assert form.with_ram(last * 2) is form.with_ram(last) is form.others[last]
        assert form.with_ram(10**9) is form.others[10**9]


@pytest.mark.parametrize(("load", "is_busy"), [(0.4, False), (1.5, True)])
def test_a_busy_machine_is_said(
    quick,
    prepared,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    load: float,
    is_busy: bool,
) -> None:
    monkeypatch.setattr("psutil.getloadavg", lambda: (4 * load, 0.0, 0.0))
    monkeypatch.setattr("psutil.cpu_count", lambda: 4)
    assert plan_command(lambda model: 0, prepared()[1], tokens=4, prompt_tokens=8) == 0
    said = "a load of 1.5 for each core: other programs are at work, so rates and times can't be trusted"
    assert (said in capsys.readouterr().out) == is_busy


@pytest.mark.slow
def test_a_plan_says_what_a_draft_takes(
    prepared, quick, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As much as the draft itself plans for, and so much less for the model."""
    directory, form = prepared()[1], tmp_path / "int4"
    other = prepared(hidden_size=48, heads=3, blocks=1, seed=5)[1]
    convert(directory, form, form="int4")
    model = runner.load(directory)
    for draft, is_form in ((form, True), (other, False)):
        given = {"tokens": 4, "prompt_tokens": 8, "draft": draft}
        assert plan_command(lambda model: 0, directory, as_json=True, **given) == 0
        found = json.loads(capsys.readouterr().out)["draft"]
        opened = DraftModel.open(draft, model.weights, model.tokenizer)
        assert found["is_form"] == opened.is_form == is_form
        assert found["bytes"] == pytest.approx(opened.nbytes(1, 12) - opened.process_nbytes, rel=0.02)
        assert found["seconds"] > 0 and found["forecast"]["streamed_bytes_per_pass"] == 0
        assert plan_command(lambda model: 0, directory, **given) == 0
        assert ("another form of the same model" in capsys.readouterr().out) == is_form
    with pytest.raises(BloomdeskError, match="drafts for a prepared directory, and there is none"):
        plan_command(lambda model: 0, tmp_path, draft=form)


def test_a_plan_for_an_unfinished_directory_says_how_to_go_on(
    quick, made_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = load_manifest(made_copy)
    parts = dict(list(manifest.parts.items())[:2])
    write_manifest(made_copy, replace(manifest, parts=parts))
    assert plan_command(lambda model: 0, made_copy, tokens=4, prompt_tokens=8) == 0
    disk = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("disk"))
    assert "are there; 3 files are still to be made: bloomdesk convert SRC " in disk


def test_a_disk_that_cannot_be_written_is_refused(
    quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    monkeypatch.setattr("tempfile.mkstemp", denied)
    with pytest.raises(BloomdeskError, match="cannot be measured: Permission denied"):
        plan_module.plan(tmp_path, None, None, 16, 4)


def test_a_slice_alone_is_planned_with_its_machines(quick, prepared, tmp_path: Path) -> None:
    convert(prepared()[0], tmp_path / "out", own=Slice(1, even(2)))
    done = run("plan", tmp_path / "out", "--machines", "2", "--json")
    found = json.loads(done.stdout)
    assert found["machines"]["count"] == 2 and found["prepared"]
    held = load_manifest(tmp_path / "out")
    text = run("plan", tmp_path / "out", "--machines", "2").stdout
    assert f"{size(sum(part.size for part in held.records))} of" in text and "slice 2/2" in text
    assert "start it on all with torchrun" in refused("plan", tmp_path / "out", "--machines", "3")


@pytest.mark.slow
@pytest.mark.parametrize("after", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_plan_leaves_nothing(tmp_path: Path, after: signal.Signals) -> None:
    if after is signal.SIGKILL and not platform.LINUX_CALLS:
        pytest.skip("only Linux has files without a name")
    with started("plan", tmp_path, "--json") as process:
        deadline = time.monotonic() + 60
        while not _has_scratch(process.pid, tmp_path) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(after)
        _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def _has_scratch(pid: int, directory: Path) -> bool:
    """Whether the process has a file in `directory` open; where that can't be told, whether a name is there."""
    descriptors = Path(f"/proc/{pid}/fd")
    if not descriptors.is_dir():
        return bool(list(directory.iterdir()))
    for link in descriptors.iterdir():
        try:
            if str(link.readlink()).startswith(f"{directory}{os.sep}"):
                return True
        except OSError:
            continue
    return False
