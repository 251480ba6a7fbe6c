"""safetensors headers: written on page boundaries, read strictly, and nothing but a clear error for the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from runner.errors import BloomdeskError
from runner.format.layout import DATA_ALIGNMENT
from runner.format.safetensors import encode_header, read_header

TRIPLES = [("b", "BF16", (3, 5)), ("a", "F32", (7,)), ("empty", "F16", (0, 2))]


def write(directory: Path, header: Any, data: bytes, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = directory / "x.safetensors"
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(start: int, end: int, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


def test_encoded_headers_are_read_back(tmp_path: Path) -> None:
    encoded = encode_header(TRIPLES, alignment=DATA_ALIGNMENT)
    assert len(encoded) % DATA_ALIGNMENT == 0
    assert encoded == encode_header(TRIPLES, alignment=DATA_ALIGNMENT)
    path = tmp_path / "x.safetensors"
    path.write_bytes(encoded + bytes(30 + 28))
    header = read_header(path)
    assert [(item.name, item.dtype, item.shape) for item in header.tensors.values()] == TRIPLES
    assert header.data_start == header.tensors["b"].start == len(encoded)
    assert header.tensors["a"].nbytes == 28
    assert load_file(path)["b"].shape == (3, 5)


def test_files_of_the_safetensors_library_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"w": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3), "v": torch.ones(4)}
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    data = path.read_bytes()
    for name, tensor in tensors.items():
        found = header.tensors[name]
        assert found.shape == tuple(tensor.shape)
        assert data[found.start : found.end] == tensor.view(torch.uint8).numpy().tobytes()
    assert header.metadata == {"format": "pt"}


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        ({"a": entry(0, 4)}, 4, 2**63),
        ({"a": entry(0, 4)}, 4, 10**6),
        (b"", 0, 0),
        (b"[]", 0, None),
        (b'{"a": 1}', 0, None),
        (b"{]", 0, None),
        (b"\xff\xff", 0, None),
        (b"[" * 50_000, 0, None),
        ({"a": entry(0, 4)}, 3, None),
        ({"a": entry(0, 4)}, 5, None),
        ({"a": entry(1, 5)}, 5, None),
        ({"a": entry(0, 4), "b": entry(2, 6)}, 6, None),
        ({"a": entry(0, 4), "b": entry(5, 9)}, 9, None),
        ({"a": entry(0, 4, shape=[5])}, 4, None),
        ({"a": entry(0, 4, shape=[-2, -2])}, 4, None),
        ({"a": entry(0, 4, shape=[4.0])}, 4, None),
        ({"a": entry(0, 4, shape=[2**70])}, 4, None),
        ({"a": entry(0, 4, shape="4")}, 4, None),
        ({"a": entry(0, 4, dtype="X9")}, 4, None),
        ({"a": entry(0, 4, dtype=["U8"])}, 4, None),
        ({"a": entry(4, 0, shape=[4])}, 4, None),
        ({"a": {**entry(0, 4), "data_offsets": [0, 4, 8]}}, 4, None),
        ({"__metadata__": [], "a": entry(0, 4)}, 4, None),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1, None),  # noqa: E501
    ],
)  # fmt: skip
def test_unsound_headers_are_refused(tmp_path: Path, header: Any, data: int, length: int | None) -> None:
    with pytest.raises(BloomdeskError) as caught:
        read_header(write(tmp_path, header, bytes(data), length))
    assert "x.safetensors" in caught.value.message


def test_empty_short_and_absent_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for content in (b"", b"\0" * 7):
        path.write_bytes(content)
        with pytest.raises(BloomdeskError):
            read_header(path)
    with pytest.raises(BloomdeskError, match="is missing"):
        read_header(tmp_path / "absent.safetensors")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
nearly_entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["BF16", "F32", "U8", "X"]) | json_values,
        "shape": st.lists(st.integers(-1, 5), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | json_values,
    },
)
headers = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__"]), nearly_entries | json_values, max_size=3
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=60)
    | st.builds(
        lambda header, data, error: (
            (len(text := json.dumps(header).encode()) + error).to_bytes(8, "little") + text + data
        ),
        headers,
        st.binary(max_size=40),
        st.sampled_from([0, 0, 0, 1, 2**40]),
    )
)
def test_any_bytes_give_a_header_or_a_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except BloomdeskError:
        return
    assert sum(item.nbytes for item in header.tensors.values()) == len(content) - header.data_start
