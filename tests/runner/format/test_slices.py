"""Slices: every row in one of them, whole heads together, and a manifest that says which."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.errors import BloomdeskError
from runner.format.coded import LOSSLESS, PLAIN
from runner.format.digest import digest
from runner.format.hyperparameters import Hyperparameters
from runner.format.layout import QUERY_KEY_VALUE, part_specs
from runner.format.manifest import Manifest, Source
from runner.format.part_record import PartRecord, TensorRecord
from runner.format.quantised import INT8_FORM
from runner.format.slices import Slice, even

MODEL = Hyperparameters(hidden_size=40, n_head=5, n_layer=2, vocab_size=50, dtype="BF16")
WHERE = Path("somewhere/manifest.json")
HASH = "ab" * 16
SHARES = st.lists(st.integers(1, 1000), min_size=1, max_size=20).map(tuple)


@given(SHARES, st.integers(0, 3000), st.integers(1, 400))
def test_each_row_is_in_one_slice(shares: tuple[int, ...], count: int, unit: int) -> None:
    ranges = [Slice(index, shares).rows(count, unit) for index in range(len(shares))]
    assert [row for rows in ranges for row in rows] == list(range(count))
    assert all(rows.start % unit == 0 or rows.start == count for rows in ranges)


@given(SHARES, st.integers(0, 3000))
def test_rows_are_in_proportion_to_the_shares(shares: tuple[int, ...], count: int) -> None:
    for index, share in enumerate(shares):
        rows = Slice(index, shares).rows(count)
        # Each of the two ends is rounded.
        assert abs(len(rows) - count * share / sum(shares)) <= 1


def test_halves_are_rounded_down() -> None:
    assert [Slice(index, (1, 1)).rows(3) for index in (0, 1)] == [range(1), range(1, 3)]


@pytest.mark.parametrize(
    ("index", "shares"),
    [(-1, (1,)), (1, (1,)), (0, ()), (0, (1, 0)), (0, (1.5,)), (0, even(1025)), (True, (1,))],
)
def test_what_is_no_slice_is_refused(index: Any, shares: Any) -> None:
    with pytest.raises(BloomdeskError, match="slice"):
        Slice(index, shares)


def test_heads_stay_whole_and_vectors_are_everywhere() -> None:
    block = part_specs(MODEL)[1]
    heads = []
    for index in range(3):
        own = Slice(index, (2, 1, 1))
        rows, sliced = block.rows(MODEL, own), block.sliced(MODEL, own)
        assert rows[QUERY_KEY_VALUE].start % 24 == rows[QUERY_KEY_VALUE].stop % 24 == 0
        heads.append(len(rows[QUERY_KEY_VALUE]) // 24)
        assert {name: shape for name, shape in sliced.tensors.items() if len(shape) == 1} == {
            name: shape for name, shape in block.tensors.items() if len(shape) == 1
        }
        assert [shape[0] for shape in sliced.matrices.values()] == [len(each) for each in rows.values()]
    assert heads == [2, 2, 1]


def record(index: int, own: Slice, form: str, *, wholes: bool = True) -> PartRecord:
    whole, spec = part_specs(MODEL)[index], part_specs(MODEL, own)[index]

    def recorded(tensors: Any) -> tuple[TensorRecord, ...]:
        return tuple(TensorRecord(*each, HASH) for each in tensors)

    coded = {name: 16 * shape[0] for name, shape in spec.matrices.items()} if form == LOSSLESS else {}
    decoded = recorded(spec.decoded(form))
    of_all = recorded((name, "BF16", shape) for name, shape in whole.matrices.items()) if wholes else ()
    found = PartRecord(
        spec.file,
        0,
        HASH,
        recorded(spec.stored("BF16", coded, form)),
        (),
        decoded,
        decoded if form == INT8_FORM else (),
        of_all,
        of_all if form == INT8_FORM else (),
    )
    return replace(found, size=len(found.header) + sum(tensor.nbytes for tensor in found.tensors))


def made(own: Slice, form: str = PLAIN, *, wholes: bool = True, places: tuple[str, ...] = ()) -> Manifest:
    manifest = Manifest(MODEL, Source(), form=form, slice=own, places=places)
    for index in range(4):
        manifest = manifest.with_part(record(index, own, form, wholes=wholes))
    return manifest


@pytest.mark.parametrize("form", [PLAIN, LOSSLESS, INT8_FORM])
@pytest.mark.parametrize("own", [Slice(0, (1,)), Slice(1, (1, 2)), Slice(5, even(9))])
def test_a_manifest_is_read_back(form: str, own: Slice) -> None:
    # Of nine slices some have no rows of a matrix.
    for manifest in (made(own, form), made(own, form, wholes=False)):
        text = manifest.to_json()
        assert json.loads(text)["format_version"] == 5
        assert Manifest.from_json(text, WHERE) == manifest
        assert Manifest.from_json(text, WHERE).to_json() == text


def test_the_fingerprint_is_that_of_all_slices() -> None:
    whole = Manifest(MODEL, Source())
    for spec in part_specs(MODEL):
        tensors = tuple(TensorRecord(name, "BF16", shape, HASH) for name, shape in spec.tensors.items())
        whole = whole.with_part(PartRecord(spec.file, 4096 + spec.nbytes("BF16"), HASH, tensors, ()))
    for own in (Slice(0, (1, 1)), Slice(1, (1, 1)), Slice(2, (1, 2, 3))):
        assert made(own).fingerprint == made(own, LOSSLESS).fingerprint == whole.fingerprint
        assert made(own, wholes=False).fingerprint is None


def test_the_command_that_resumes_names_the_slice() -> None:
    assert made(Slice(1, (1, 1))).command(Path("d")) == "bloomdesk convert SRC d --slice 2/2"
    assert made(Slice(0, (2, 1))).command(Path("d")) == "bloomdesk convert SRC d --slice 1/2 --shares 2,1"
    together = made(Slice(0, (2, 1)), places=("/a", "/b c"))
    assert together.command(Path("/a")) == "bloomdesk convert SRC /a --also '/b c' --shares 2,1"


def test_rows_cut_out_of_rounded_weights_have_no_originals() -> None:
    manifest = made(Slice(0, (2, 1)), INT8_FORM)
    parts = {file: replace(part, originals=()) for file, part in manifest.parts.items()}
    cut = replace(manifest, parts=parts)
    assert Manifest.from_json(cut.to_json(), WHERE) == cut
    assert cut.source_fingerprint == manifest.source_fingerprint
    bare = {file: replace(part, wholes=(), whole_originals=()) for file, part in parts.items()}
    with pytest.raises(BloomdeskError, match="without what its matrices were made from"):
        Manifest.from_json(replace(cut, parts=bare).to_json(), WHERE)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["slice"].update(index=2),
        lambda body: body["slice"].update(shares=[1, 2]),
        lambda body: body["slice"].update(extra=1),
        lambda body: body.update(places=["/a"]),
        lambda body: body.update(places=["/a", 7]),
        lambda body: body.update(places=["/a", "/b\0"]),
        lambda body: body.pop("places"),
        lambda body: body.pop("slice"),
        lambda body: body.update(format_version=1),
        lambda body: body["parts"][0]["wholes"][0].update(shape=[40, 50]),
        lambda body: body["parts"][0]["wholes"][0].update(xxh3_128="0"),
        lambda body: body["parts"][0].pop("wholes"),
        lambda body: body["parts"][0].update(whole_originals=[]),
    ],
)
def test_other_texts_are_refused(change: Any) -> None:
    body = json.loads(made(Slice(0, (2, 1)), places=("/a", "/b")).to_json())
    body.pop("sha256")
    change(body)
    with pytest.raises(BloomdeskError, match="not a sound manifest"):
        Manifest.from_json(json.dumps({**body, "sha256": digest(body)}), WHERE)
