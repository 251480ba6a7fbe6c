"""The contract: specs, the manifest's text, and that nothing edited or made up is ever taken for a manifest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.errors import BloomdeskError
from runner.format.coded import LOSSLESS, largest_row_group, read_row_groups, row_group_count
from runner.format.digest import digest
from runner.format.hyperparameters import Hyperparameters
from runner.format.layout import block_file, part_header, part_specs
from runner.format.manifest import CompanionRecord, Manifest, Source, load_manifest
from runner.format.part_record import PartRecord, SourceShard, TensorRecord

MODEL = Hyperparameters(hidden_size=8, n_head=2, n_layer=2, vocab_size=10, dtype="F16")
WHERE = Path("somewhere/manifest.json")


def record(index: int) -> PartRecord:
    spec = part_specs(MODEL)[index]
    tensors = tuple(TensorRecord(name, "F16", shape, "ab" * 16) for name, shape in spec.tensors.items())
    return PartRecord(
        spec.file, 4096 + spec.nbytes("F16"), "cd" * 16, tensors, (SourceShard("s.bin", "ef" * 32),)
    )


def whole() -> Manifest:
    companions = {name: CompanionRecord(name, 3, "01" * 16) for name in ("config.json", "tokenizer.json")}
    manifest = Manifest(MODEL, Source("me/bloom", "0" * 40), companions=companions)
    for index in (3, 1, 0, 2):
        manifest = manifest.with_part(record(index))
    return manifest


def test_parts_are_kept_in_the_order_of_a_pass() -> None:
    assert list(whole().parts) == [spec.file for spec in part_specs(MODEL)]
    assert whole().missing == ()


def test_files_without_a_record_are_missing() -> None:
    manifest = Manifest(MODEL, Source()).with_part(record(1))
    assert manifest.missing == (
        "embedding.safetensors",
        "block_01.safetensors",
        "final_layernorm.safetensors",
        "config.json",
        "tokenizer.json",
    )


def test_a_manifest_is_read_back_from_its_text() -> None:
    text = whole().to_json()
    assert Manifest.from_json(text, WHERE) == whole()
    assert Manifest.from_json(text, WHERE).to_json() == text


def test_block_files_sort_by_number() -> None:
    assert block_file(7, 70) == "block_07.safetensors"
    names = [block_file(index, 101) for index in range(101)]
    assert names == sorted(names)


@pytest.mark.parametrize("name", ["hidden_size", "n_head", "n_layer", "vocab_size"])
@pytest.mark.parametrize("value", [0, -1, 2**50, 1.5, "8", None, True])
def test_impossible_hyperparameters_are_refused(name: str, value: Any) -> None:
    with pytest.raises(BloomdeskError, match=name):
        replace(MODEL, **{name: value})


def test_an_edited_manifest_is_refused() -> None:
    text = whole().to_json()
    edited = text.replace('"size": 4', '"size": 5', 1)
    assert edited != text
    with pytest.raises(BloomdeskError, match="edited or damaged"):
        Manifest.from_json(edited, WHERE)


def test_another_format_version_is_refused() -> None:
    with pytest.raises(
        BloomdeskError, match="format version 6, this program reads 1 and 2 and 3 and 4 and 5"
    ):
        Manifest.from_json(whole().to_json().replace('"format_version": 1', '"format_version": 6'), WHERE)


def signed(change: Any) -> str:
    """A manifest with a right checksum over changed contents, as a careful forger would write it."""
    body = json.loads(whole().to_json())
    body.pop("sha256")
    change(body)
    return json.dumps({**body, "sha256": digest(body)})


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["parts"].append(body["parts"][0]),
        lambda body: body["parts"][0].update(file="../../etc/passwd"),
        lambda body: body["parts"][0].update(extra=1),
        lambda body: body["parts"][0].update(size=-1),
        lambda body: body["parts"][0].update(xxh3_128="zz"),
        lambda body: body["parts"][0].update(tensors=[]),
        lambda body: body["parts"][0]["tensors"][0].update(shape=[10, 9]),
        lambda body: body["parts"][0]["sources"][0].update(sha256="short"),
        lambda body: body["companions"].append({"file": "../x", "size": 1, "xxh3_128": "01" * 16}),
        lambda body: body["companions"][0].update(size="3"),
        lambda body: body["model"].update(n_layer=10**12),
        lambda body: body["model"].pop("n_head"),
        lambda body: body.pop("parts"),
        lambda body: body.update(source=7),
    ],
)
def test_a_forged_manifest_is_refused(change: Any) -> None:
    with pytest.raises(BloomdeskError, match="not a sound manifest"):
        Manifest.from_json(signed(change), WHERE)


def test_an_unsound_directory_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(BloomdeskError, match=r"has no manifest\.json") as caught:
        load_manifest(tmp_path)
    assert "bloomdesk convert" in caught.value.hint
    with pytest.raises(BloomdeskError, match="is not a directory"):
        load_manifest(tmp_path / "absent")
    (tmp_path / "manifest.json").write_bytes(b"\xff\xff")
    with pytest.raises(BloomdeskError, match="UTF-8"):
        load_manifest(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in inner for found in paths(item, (*path, key)))]


BODY = {key: value for key, value in json.loads(whole().to_json()).items() if key != "sha256"}
PATHS = [path for path in paths(BODY) if path]


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(path=st.sampled_from(PATHS), value=json_values)
def test_any_value_anywhere_gives_a_manifest_or_a_clear_error(path: tuple[Any, ...], value: Any) -> None:
    body = json.loads(json.dumps(BODY))
    place = body
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    text = json.dumps({**body, "sha256": digest(body)})
    try:
        manifest = Manifest.from_json(text, WHERE)
    except BloomdeskError:
        return
    assert isinstance(manifest, Manifest)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=50) | json_values.map(json.dumps))
def test_any_text_gives_a_clear_error(text: str) -> None:
    with pytest.raises(BloomdeskError):
        Manifest.from_json(text, WHERE)


CODED_MODEL = replace(MODEL, dtype="BF16", vocab_size=25)


def coded_record(index: int, nbytes: int = 1600) -> PartRecord:
    """A part of a lossless directory whose matrices all have `nbytes` coded bytes."""
    spec = part_specs(CODED_MODEL)[index]
    stored = spec.stored("BF16", dict.fromkeys(spec.matrices, nbytes))
    tensors = tuple(TensorRecord(*described, "ab" * 16) for described in stored)
    decoded = tuple(TensorRecord(*described, "ba" * 16) for described in spec.decoded(LOSSLESS))
    record = PartRecord(spec.file, 0, "cd" * 16, tensors, (SourceShard("s.bin", "ef" * 32),), decoded)
    return replace(record, size=len(record.header) + sum(tensor.nbytes for tensor in tensors))


def lossless() -> Manifest:
    manifest = Manifest(CODED_MODEL, Source("me/bloom", "0" * 40), form=LOSSLESS)
    for index in range(4):
        manifest = manifest.with_part(coded_record(index))
    return manifest


def test_a_lossless_manifest_is_read_back_from_its_text() -> None:
    text = lossless().to_json()
    assert json.loads(text)["format_version"] == 2
    assert Manifest.from_json(text, WHERE) == lossless()
    assert Manifest.from_json(text, WHERE).to_json() == text


def test_a_plain_manifest_has_no_field_about_coding() -> None:
    body = json.loads(whole().to_json())
    assert list(body) == [
        "format",
        "format_version",
        "source",
        "model",
        "fingerprint",
        "source_shards",
        "parts",
        "companions",
        "sha256",
    ]
    assert body["format_version"] == 1
    assert {key for part in body["parts"] for key in part} == {
        "file",
        "size",
        "xxh3_128",
        "tensors",
        "sources",
    }


def test_a_lossless_part_stores_offsets_and_coded_bytes() -> None:
    embedding = part_specs(CODED_MODEL)[0]
    assert embedding.stored("BF16", {"word_embeddings.weight": 320}) == (
        ("word_embeddings.weight.strips", "I64", (4,)),
        ("word_embeddings.weight", "U8", (320,)),
        ("word_embeddings_layernorm.weight", "BF16", (8,)),
        ("word_embeddings_layernorm.bias", "BF16", (8,)),
    )
    assert embedding.stored("F32", {})[0] == ("word_embeddings.weight", "F32", (25, 8))
    assert [len(spec.matrices) for spec in part_specs(CODED_MODEL)] == [1, 4, 4, 0]


@pytest.mark.parametrize("nbytes", [16, 1600, 10**9, 10**14])
def test_the_header_of_a_coded_part_has_one_length(nbytes: int) -> None:
    for index in range(4):
        header = coded_record(index, nbytes).header
        assert len(header) == len(coded_record(index).header)
        assert len(header) % 4096 == 0
    assert coded_record(3).header == part_header(part_specs(CODED_MODEL)[3].stored("BF16", {}))


def part_of(body: Any, index: int = 1) -> Any:
    return body["parts"][index]


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.update(coding="plain"),
        lambda body: body.update(coding=["lossless"]),
        lambda body: body.pop("coding"),
        lambda body: body.update(format_version=1),
        lambda body: body["model"].update(dtype="F16"),
        lambda body: part_of(body).pop("decoded"),
        lambda body: part_of(body).update(decoded=[]),
        lambda body: part_of(body)["decoded"].reverse(),
        lambda body: part_of(body)["decoded"][0].update(shape=[8, 24]),
        lambda body: part_of(body)["decoded"][0].update(dtype="F16"),
        lambda body: part_of(body)["decoded"][0].update(xxh3_128="AB" * 16),
        lambda body: part_of(body, 3).update(decoded=part_of(body)["decoded"]),
        lambda body: part_of(body)["tensors"].pop(2),
        lambda body: part_of(body)["tensors"][2].update(shape=[4]),
        lambda body: part_of(body)["tensors"][2].update(dtype="U64"),
        lambda body: part_of(body)["tensors"][3].update(shape=[1616]),
        lambda body: part_of(body)["tensors"][3].update(shape=[1600, 1]),
        lambda body: part_of(body)["tensors"][3].update(shape=[]),
        lambda body: part_of(body)["tensors"][3].update(dtype="I8"),
        lambda body: part_of(body).update(size=part_of(body)["size"] + 1),
        lambda body: (
            part_of(body)["tensors"][3].update(shape=[1601]),
            part_of(body).update(size=part_of(body)["size"] + 1),
        ),
        lambda body: (
            part_of(body)["tensors"][3].update(shape=[0]),
            part_of(body).update(size=part_of(body)["size"] - 1600),
        ),
    ],
)
def test_a_forged_lossless_manifest_is_refused(change: Any) -> None:
    body = json.loads(lossless().to_json())
    body.pop("sha256")
    change(body)
    with pytest.raises(BloomdeskError, match="not a sound manifest"):
        Manifest.from_json(json.dumps({**body, "sha256": digest(body)}), WHERE)


def test_a_plain_manifest_with_lossless_fields_is_refused() -> None:
    with pytest.raises(BloomdeskError, match="unknown fields"):
        Manifest.from_json(signed(lambda body: body["parts"][0].update(decoded=[])), WHERE)


def row_groups(*offsets: int) -> bytes:
    return b"".join(offset.to_bytes(8, "little", signed=True) for offset in offsets)


def test_row_groups_of_a_matrix() -> None:
    assert [row_group_count(rows) for rows in (1, 12, 13, 24, 25)] == [1, 1, 2, 2, 3]
    assert list(read_row_groups(row_groups(0, 100, 200, 208), 25, 8, 208)) == [0, 100, 200, 208]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        row_groups(0, 100, 208),
        row_groups(0, 100, 200, 208, 208),
        row_groups(1, 100, 200, 208),
        row_groups(0, 100, 200, 209),
        row_groups(0, 100, 100, 208),
        row_groups(0, 150, 100, 208),
        row_groups(0, -8, 100, 208),
        row_groups(0, 2**63 - 1, 200, 208),
        row_groups(0, 100, 200, 208)[:-1],
    ],
)
def test_impossible_row_groups_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"row group|multiple"):
        read_row_groups(data, 25, 8, 208)


def test_a_row_group_has_a_largest_size() -> None:
    most = largest_row_group(8)
    assert read_row_groups(row_groups(0, most, most + 1), 13, 8, most + 1)[1] == most
    with pytest.raises(ValueError, match="row group 0 cannot have"):
        read_row_groups(row_groups(0, most + 1, most + 2), 13, 8, most + 2)
