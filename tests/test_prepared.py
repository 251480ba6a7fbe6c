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
from runner.prepared import (
    CompanionRecord,
    Hyperparameters,
    Manifest,
    PartRecord,
    Source,
    SourceShard,
    TensorRecord,
    _digest,
    block_file,
    load_manifest,
    part_specs,
)

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


def test_missing_is_what_is_not_recorded() -> None:
    manifest = Manifest(MODEL, Source()).with_part(record(1))
    assert manifest.missing == (
        "embedding.safetensors",
        "block_01.safetensors",
        "final_layernorm.safetensors",
        "config.json",
        "tokenizer.json",
    )


def test_text_and_back() -> None:
    text = whole().to_json()
    assert Manifest.from_json(text, WHERE) == whole()
    assert Manifest.from_json(text, WHERE).to_json() == text


def test_block_files_sort_by_number() -> None:
    assert block_file(7, 70) == "block_07.safetensors"
    names = [block_file(index, 101) for index in range(101)]
    assert names == sorted(names)


@pytest.mark.parametrize("name", ["hidden_size", "n_head", "n_layer", "vocab_size"])
@pytest.mark.parametrize("value", [0, -1, 2**50, 1.5, "8", None, True])
def test_wild_hyperparameters(name: str, value: Any) -> None:
    with pytest.raises(BloomdeskError, match=name):
        replace(MODEL, **{name: value})


def test_an_edited_manifest_is_refused() -> None:
    text = whole().to_json()
    edited = text.replace('"size": 4', '"size": 5', 1)
    assert edited != text
    with pytest.raises(BloomdeskError, match="edited or damaged"):
        Manifest.from_json(edited, WHERE)


def test_another_format_version_is_refused() -> None:
    with pytest.raises(BloomdeskError, match="format version 2"):
        Manifest.from_json(whole().to_json().replace('"format_version": 1', '"format_version": 2'), WHERE)


def signed(change: Any) -> str:
    """A manifest with a right checksum over changed contents, as a careful forger would write it."""
    body = json.loads(whole().to_json())
    body.pop("sha256")
    change(body)
    return json.dumps({**body, "sha256": _digest(body)})


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


def test_load_says_what_is_wrong_with_a_directory(tmp_path: Path) -> None:
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


@settings(max_examples=150, deadline=None)
@given(path=st.sampled_from(PATHS), value=json_values)
def test_any_value_anywhere_gives_a_manifest_or_a_clear_error(path: tuple[Any, ...], value: Any) -> None:
    body = json.loads(json.dumps(BODY))
    place = body
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    text = json.dumps({**body, "sha256": _digest(body)})
    try:
        manifest = Manifest.from_json(text, WHERE)
    except BloomdeskError:
        return
    assert isinstance(manifest, Manifest)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=50) | json_values.map(json.dumps))
def test_any_text_gives_a_clear_error(text: str) -> None:
    with pytest.raises(BloomdeskError):
        Manifest.from_json(text, WHERE)
