"""Directories of int8 and int4: what they hold and record, damage to them, kills, and the forms that they are not."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file

from runner.errors import BloomdeskError
from runner.format.coded import LOSSLESS, PLAIN
from runner.format.layout import MANIFEST
from runner.format.manifest import Manifest, load_manifest
from runner.format.quantised import INT4_FORM, INT8_FORM, QUANTISED_FORMS, SCALES_SUFFIX
from runner.format.safetensors import read_header
from runner.kernel import quantised as quantiser
from scripts.fakehub.server import Fault, LocalHub
from tests.runner.kernel import quantised_reference as reference
from tests.support.commands import refused, run
from tests.support.lossless import (
    change_as_it_is_written,
    content,
    damage_everything,
    flip,
    interrupt_at,
    make,
)
from tests.toolkit.source.test_shards import LAYOUTS, data
from toolkit.commands.build import carry_out
from toolkit.commands.convert import convert, plan_conversion
from toolkit.commands.export import export
from toolkit.commands.info import inspect
from toolkit.commands.prepare import prepare
from toolkit.commands.repair import repair
from toolkit.commands.schedule import space_to_prepare
from toolkit.commands.verify import verify
from toolkit.hub import retry
from toolkit.io.progress import Progress, silent
from toolkit.parts import row_groups
from toolkit.parts.part import part_size

REPO = "me/bloom"
BLOCK = "block_01.safetensors"
MATRIX = "mlp.dense_4h_to_h.weight"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("quantised") / "source")


@pytest.fixture(scope="module", params=QUANTISED_FORMS)
def made(request: pytest.FixtureRequest, sources: Path) -> tuple[Path, Path, str]:
    """(source, directory, form)."""
    out = sources.parent / request.param
    if not out.exists():
        convert(sources, out, form=request.param)
    return sources, out, request.param


@pytest.fixture
def copy(made: tuple[Path, Path, str], tmp_path: Path) -> Path:
    """A directory of the test's own."""
    return Path(shutil.copytree(made[1], tmp_path / "bloom"))


def decoded_by_the_reference(part: dict[str, torch.Tensor], name: str, coding: dict) -> list[list[float]]:
    rows, columns = coding["shape"]
    found = []
    for row in range(rows):
        own, scales = bytes(data(part[name][row])), bytes(data(part[name + SCALES_SUFFIX][row]))
        if coding["coding"] == "int8":
            found.append(reference.int8_weights(own, scales, columns, coding["dtype"]))
        else:
            bits = {"int4": 4, "int5": 5}[coding["coding"]]
            found.append(reference.int45_weights(own, scales, columns, bits, coding["dtype"]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", [{}, {"hidden_size": 6, "heads": 2, "vocab_size": 37}])
@pytest.mark.parametrize("form", QUANTISED_FORMS)
def test_a_part_can_be_read_by_its_metadata_alone(tmp_path: Path, form: str, dtype: str, shape: dict) -> None:
    """By a safetensors reader and the description in docs/format.md; and that is what an export has."""
    source, out = make(tmp_path / "source", dtype=dtype, **shape), tmp_path / "out"
    convert(source, out, form=form)
    export(out, tmp_path / "export")
    weights = {}
    for path in (tmp_path / "export").glob("*.safetensors"):
        weights |= {key.removeprefix("transformer."): value for key, value in load_file(path).items()}
    for file, prefix in (("block_00.safetensors", "h.0."), ("embedding.safetensors", "")):
        part = load_file(out / file)
        with safe_open(out / file, framework="pt") as opened:
            codings = json.loads(opened.metadata()["bloomdesk.quantised"])
        assert codings["version"] == 1
        for name, coding in codings["tensors"].items():
            expected = weights[prefix + name]
            assert decoded_by_the_reference(part, name, coding) == expected.tolist(), name
        for name in part.keys() - codings["tensors"].keys():
            if not name.endswith(SCALES_SUFFIX):
                assert torch.equal(part[name], weights[prefix + name]), name


def test_sensitive_matrices_have_more_bits(made: tuple[Path, Path, str]) -> None:
    _, out, form = made
    found = {}
    for file in ("block_00.safetensors", "embedding.safetensors"):
        with safe_open(out / file, framework="pt") as opened:
            tensors = json.loads(opened.metadata()["bloomdesk.quantised"])["tensors"]
        found |= {name.split(".")[-2]: each["coding"] for name, each in tensors.items()}
    eights = dict.fromkeys(found, "int8")
    fewer = {"query_key_value": "int4", "dense": "int5", "dense_h_to_4h": "int4", "dense_4h_to_h": "int5"}
    assert found == (eights if form == INT8_FORM else {"word_embeddings": "int8", **fewer})


def test_the_manifest_records_what_the_file_holds_and_what_it_was_made_from(
    made: tuple[Path, Path, str], tmp_path: Path
) -> None:
    source, out, form = made
    convert(source, tmp_path / "plain")
    plain, manifest = load_manifest(tmp_path / "plain"), load_manifest(out)
    body = json.loads((out / MANIFEST).read_text())
    assert (body["format_version"], body["coding"]) == (4, form)
    assert body["source_fingerprint"] == plain.fingerprint != body["fingerprint"]
    for file, record in manifest.parts.items():
        stored = (out / file).read_bytes()
        assert record.xxh3_128 == xxhash.xxh3_128_hexdigest(stored) and stored.startswith(record.header)
        entries = read_header(out / file).tensors
        assert list(entries) == [tensor.name for tensor in record.tensors]
        for tensor in record.tensors:
            entry = entries[tensor.name]
            assert tensor.xxh3_128 == xxhash.xxh3_128_hexdigest(stored[entry.start : entry.end])
        assert record.source_tensors == plain.parts[file].tensors
        for shard in record.sources:
            assert shard.sha256 == hashlib.sha256((source / shard.file).read_bytes()).hexdigest()
    assert Manifest.from_json((out / MANIFEST).read_text(), out) == manifest


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.update(source_fingerprint="0" * 64),
        lambda body: body.pop("source_fingerprint"),
        lambda body: body.update(coding=PLAIN),
        lambda body: body.update(coding="int4" if body["coding"] == "int8" else "int8"),
        lambda body: body.update(coding="int3"),
        lambda body: body.update(format_version=2),
        lambda body: body["parts"][1]["originals"].pop(),
        lambda body: body["parts"][1].pop("originals"),
        lambda body: body["parts"][1]["decoded"].pop(),
        lambda body: body["parts"][1]["originals"][0].update(xxh3_128="z" * 32),
        lambda body: body["parts"][1]["tensors"].pop(),
    ],
)
def test_a_forged_manifest_is_refused(made: tuple[Path, Path, str], change) -> None:
    from runner.format.digest import digest

    body = json.loads((made[1] / MANIFEST).read_text())
    del body["sha256"]
    change(body)
    with pytest.raises(BloomdeskError, match="not a sound manifest"):
        Manifest.from_json(json.dumps({**body, "sha256": digest(body)}), made[1])


@pytest.mark.parametrize("threads", [1, 7])
def test_threads_layouts_and_chunks_change_no_byte(
    made: tuple[Path, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(row_groups, "THREADS", threads)
    monkeypatch.setattr(row_groups, "CHUNK", 1)
    source = make(tmp_path / "source", LAYOUTS["cut blocks"])
    convert(source, tmp_path / "out", form=made[2])
    for file in load_manifest(made[1]).parts:
        assert (tmp_path / "out" / file).read_bytes() == (made[1] / file).read_bytes(), file


def test_progress_counts_the_bytes_of_the_source(made: tuple[Path, Path, str], tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    plan = plan_conversion(made[0], tmp_path / "out", form=made[2])
    summary = carry_out(plan, lambda file, done, total: seen.setdefault(file, []).append((done, total)))
    for file, steps in seen.items():
        assert [done for done, _ in steps] == sorted(done for done, _ in steps), file
        assert steps[-1][0] == steps[-1][1]
    assert sum(steps[-1][1] for steps in seen.values()) == plan.work
    assert summary.bytes_written == plan.bytes_to_write


def test_what_is_no_number_has_no_such_form(tmp_path: Path, made: tuple[Path, Path, str]) -> None:
    source = make(tmp_path / "source", LAYOUTS["single bin"])
    state = torch.load(source / "pytorch_model.bin", weights_only=True)
    key = next(key for key in state if key.endswith("h.1.mlp.dense_4h_to_h.weight"))
    state[key][0, 0] = float("nan")
    torch.save(state, source / "pytorch_model.bin")
    with pytest.raises(BloomdeskError, match=f"{key} has no {made[2]} form: weights are infinite") as caught:
        convert(source, tmp_path / "out", form=made[2])
    assert "--form lossless" in caught.value.hint
    assert list(load_manifest(tmp_path / "out").parts) == ["embedding.safetensors", "block_00.safetensors"]


def test_a_source_is_not_deleted_for_what_was_rounded(made: tuple[Path, Path, str], tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    before = content(source)
    with pytest.raises(BloomdeskError, match="can't be had back"):
        plan_conversion(source, tmp_path / "out", delete_source=True, form=made[2])
    assert content(source) == before and not (tmp_path / "out").exists()


def test_a_directory_has_one_form(made: tuple[Path, Path, str], copy: Path) -> None:
    before = content(copy)
    for other in {PLAIN, LOSSLESS, *QUANTISED_FORMS} - {made[2]}:
        with pytest.raises(BloomdeskError, match=f"was started with --form {made[2]}"):
            convert(made[0], copy, form=other)
    assert content(copy) == before
    assert convert(made[0], copy, form=made[2]).written == ()


@pytest.mark.parametrize("share", [0.0, 0.03, 0.2, 0.5, 0.9, 0.999999])
def test_a_part_that_the_disk_changed_is_never_put_in_place(
    made: tuple[Path, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """One bit of the file, from the header to the last vector, between writing and reading back."""
    out = tmp_path / "out"
    change_as_it_is_written(monkeypatch, out / f"{BLOCK}.incomplete", share)
    with pytest.raises(BloomdeskError, match=f"{BLOCK} does not read back"):
        convert(made[0], out, form=made[2])
    assert not (out / BLOCK).exists() and BLOCK not in load_manifest(out).parts


def test_a_decoder_that_errs_is_noticed(
    made: tuple[Path, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that errs once, as the part is compared."""
    right, calls = quantiser.dequantise_rows, []

    def dequantise(*arguments) -> None:
        right(*arguments)
        calls.append(1)
        if len(calls) == 8:
            arguments[-1][0] ^= 1

    monkeypatch.setattr(quantiser, "dequantise_rows", dequantise)
    with pytest.raises(BloomdeskError, match="does not read back from the disk as it should"):
        convert(made[0], tmp_path / "out", form=made[2])


def test_each_kind_of_damage_is_named(copy: Path) -> None:
    entries = read_header(copy / BLOCK).tensors
    for name in (MATRIX, MATRIX + SCALES_SUFFIX, "mlp.dense_h_to_4h.bias"):
        for position in (entries[name].start, entries[name].end - 1):
            flip(copy / BLOCK, position)
            assert [(item.file, item.tensor) for item in verify(copy).damage] == [(BLOCK, name)]
            assert verify(copy, quick=True).sound
            flip(copy / BLOCK, position)
    flip(copy / BLOCK, 40)
    for quick in (False, True):
        (damage,) = verify(copy, quick=quick).damage
        assert (damage.file, damage.tensor) == (BLOCK, None) and "header" in damage.what


@pytest.mark.parametrize("name", [MATRIX, MATRIX + SCALES_SUFFIX])
def test_a_damaged_tensor_is_never_exported(copy: Path, tmp_path: Path, name: str) -> None:
    entry = read_header(copy / BLOCK).tensors[name]
    # The sign of a scale, the highest bit of an integer.
    flip(copy / BLOCK, entry.start + 1, 128)
    with pytest.raises(BloomdeskError, match=f"{BLOCK} is damaged and was not exported: {MATRIX}"):
        export(copy, tmp_path / "out")
    assert not (tmp_path / "out" / "model-00003-of-00005.safetensors").exists()


def test_an_interrupted_repair_is_resumed_and_makes_the_same_bytes(
    made: tuple[Path, Path, str], copy: Path
) -> None:
    source, out, _ = made
    damage_everything(copy, SCALES_SUFFIX)

    @contextmanager
    def work(verb: str, total: int) -> Iterator[Progress]:
        yield interrupt_at(BLOCK) if verb == "repairing" else silent

    with pytest.raises(KeyboardInterrupt):
        repair(copy, source, work=work)
    assert (copy / MANIFEST).read_bytes() == (out / MANIFEST).read_bytes()
    assert set(repair(copy, source).parts) == set(list(load_manifest(out).parts)[2:])
    assert content(copy) == content(out)


def test_a_repair_from_other_weights_is_refused(
    made: tuple[Path, Path, str], copy: Path, tmp_path: Path
) -> None:
    """Weights that round to the same integers are others, too."""
    source = make(tmp_path / "source", LAYOUTS["single bin"])
    state = torch.load(source / "pytorch_model.bin", weights_only=True)
    key = next(key for key in state if key.endswith("h.1.mlp.dense_4h_to_h.weight"))
    matrix = state[key].view(torch.int16)
    matrix[0, 0] ^= 1
    torch.save(state, source / "pytorch_model.bin")
    flip(copy / BLOCK, 9000)
    before = content(copy)
    with pytest.raises(BloomdeskError, match=f"is not what {BLOCK} was made from"):
        repair(copy, source)
    assert content(copy) == before


def test_info_and_the_commands(made: tuple[Path, Path, str], tmp_path: Path) -> None:
    source, out, form = made
    found, manifest = inspect(out), load_manifest(out)
    stored = sum(record.size - len(record.header) for record in manifest.parts.values())
    assert found.pass_bytes == stored and found.as_json()["coding"] == form
    half = replace(manifest, parts={BLOCK: manifest.parts[BLOCK]})
    assert replace(found, manifest=half).stored_bytes == stored + 4 * 4096
    done = run("convert", source, tmp_path / "out", "--form", form)
    assert done.returncode == 0 and "5 parts written" in done.stdout, done
    assert content(tmp_path / "out") == content(out)
    assert f"{form}, 0." in run("info", out).stdout
    assert f"--form {form} to resume it" in refused("convert", source, out)
    assert "--form lossless" in refused("convert", source, tmp_path / "new", "--lossless")
    assert "give one of plain, lossless, int8, int4" in refused(
        "convert", source, tmp_path / "new", "--form", "q"
    )


def test_the_sizes_of_the_real_model() -> None:
    from runner.estimate.family import SHAPES, VOCABULARY
    from runner.format.hyperparameters import Hyperparameters
    from runner.format.layout import part_specs

    hidden, heads, blocks = SHAPES["bloom"]
    model = Hyperparameters(hidden, heads, blocks, VOCABULARY, "BF16")
    plain = sum(part_size(spec, "BF16") for spec in part_specs(model))
    for form, most in ((INT8_FORM, 0.53), (INT4_FORM, 0.32)):
        share = sum(part_size(spec, "BF16", form) for spec in part_specs(model)) / plain
        assert most - 0.02 < share < most
        assert space_to_prepare(model, form) < (most + 0.03) * space_to_prepare(model)


@pytest.fixture
def hub(sources: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    monkeypatch.setattr(retry, "BACKOFF", (0.01,) * 5)
    with LocalHub({REPO: sources}) as local:
        monkeypatch.setenv("HF_ENDPOINT", local.endpoint)
        yield local


def test_prepare_and_repair_from_the_hub(hub: LocalHub, made: tuple[Path, Path, str], tmp_path: Path) -> None:
    out, form = tmp_path / "out", made[2]
    done = prepare(REPO, out, form=form)
    assert done.bytes_written == sum((out / file).stat().st_size for file in done.written)
    parts = load_manifest(made[1]).parts
    for file in parts:
        assert (out / file).read_bytes() == (made[1] / file).read_bytes()
    before = content(out)
    assert not prepare(REPO, out, form=form).written
    damage_everything(out, SCALES_SUFFIX)
    assert set(repair(out).parts) == set(parts)
    assert content(out) == before


@pytest.mark.slow
@pytest.mark.parametrize("form", QUANTISED_FORMS)
def test_prepare_resumes_after_a_kill(hub: LocalHub, tmp_path: Path, form: str) -> None:
    """SIGKILL while a part is rounded and while one is compared, with a drop on the line."""
    hub.fail("pytorch_model_00002-of-00005.bin", Fault(drop_after=40_000, times=1))
    code = """if 1:
        import os, signal, sys
        from pathlib import Path
        from toolkit.commands.prepare import prepare
        def progress(file, done, total):
            if file == sys.argv[3] and done * 3 > total * int(sys.argv[4]):
                os.kill(os.getpid(), signal.SIGKILL)
        prepare(sys.argv[1], Path(sys.argv[2]), progress=progress, form=sys.argv[5])
    """
    for number, third in ((0, 1), (1, 2)):
        file = f"block_0{number}.safetensors"
        command = [sys.executable, "-c", code, REPO, str(tmp_path / "out"), file, str(third), form]
        done = subprocess.run(command, cwd=Path(__file__).resolve().parents[3])
        assert done.returncode == -signal.SIGKILL
        recorded = load_manifest(tmp_path / "out").parts
        assert len(recorded) == number + 1 and not (tmp_path / "out" / file).exists()
        assert not [item for item in verify(tmp_path / "out").damage if item.file in recorded]
    prepare(REPO, tmp_path / "out", form=form)
    prepare(REPO, tmp_path / "undisturbed", form=form)
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")
