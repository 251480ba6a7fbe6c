"""The lossless form: what the encoder writes, decoded again bit by bit, whole and in a product; and damage to it."""

from __future__ import annotations

import random
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import runner.kernel.matmul
from runner.format.coded import PANEL_COLUMNS, ROW_GROUP_ROWS, row_group_count
from runner.kernel.decode import HEADER, STORED, decode_row_groups
from runner.kernel.encode import encode_row_groups
from runner.kernel.matmul import Kernel
from runner.kernel.threads import workers
from tests.support.guarded import Guarded

SHAPES = [(1, 1), (5, 7), (12, 64), (13, 48), (25, 4097), (12, 8200), (31, 200)]


def bits(weight: torch.Tensor) -> bytearray:
    return bytearray(weight.contiguous().view(torch.int16).numpy().tobytes())


def coded(weight: torch.Tensor) -> tuple[bytearray, list[int]]:
    """The coded bytes of a bfloat16 matrix, and where its row groups begin and end."""
    data, lengths = encode_row_groups(bits(weight), weight.shape[1])
    return bytearray(data), [0, *accumulate(lengths)]


def decoded(data: bytearray, offsets: list[int], shape: tuple[int, ...]) -> bytearray:
    rows, columns = shape
    out = bytearray(2 * rows * columns)
    decode_row_groups(data, offsets, rows, columns, out)
    return out


def normal(*shape: int, scale: float = 0.02, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).bfloat16()


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_every_bit_comes_back(shape: tuple[int, int]) -> None:
    weight = normal(*shape)
    data, offsets = coded(weight)
    assert len(offsets) == row_group_count(shape[0]) + 1
    assert decoded(data, offsets, shape) == bits(weight)
    assert coded(weight) == (data, offsets)


def test_every_pattern_of_bits_comes_back() -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(16, 4096)
    assert decoded(*coded(every), every.shape) == bits(every)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_mixture_of_exponents_comes_back(data: st.DataObject) -> None:
    kinds = data.draw(st.integers(1, 256))
    shape = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 300))
    generator = random.Random(data.draw(st.integers(0, 2**32)))
    falling = [2.0 ** -(place * data.draw(st.sampled_from([0, 0.1, 1, 3]))) for place in range(kinds)]
    exponents = generator.choices(generator.sample(range(256), kinds), weights=falling, k=shape[0] * shape[1])
    words = [
        (exponent << 7) | generator.getrandbits(7) | generator.getrandbits(1) << 15 for exponent in exponents
    ]
    weight = torch.tensor(words, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(shape)
    assert decoded(*coded(weight), shape) == bits(weight)


@pytest.mark.parametrize("scale", [1.0, 1.2, 1.4, 1.7])
def test_normal_weights_become_two_thirds(scale: float) -> None:
    weight = normal(240, 4096, scale=scale)
    assert 0.66 < len(coded(weight)[0]) / weight.nbytes < 0.672


def test_noise_does_not_become_larger_by_more_than_its_headers() -> None:
    noise = torch.randint(-(2**15), 2**15, (24, 5000), generator=torch.Generator().manual_seed(1))
    weight = noise.to(torch.int16).view(torch.bfloat16)
    data, offsets = coded(weight)
    assert len(data) <= weight.nbytes + 4 * (HEADER + 16)
    assert data[STORED] == 1
    assert decoded(data, offsets, weight.shape) == bits(weight)


def test_rows_can_be_coded_and_decoded_some_at_a_time() -> None:
    weight = normal(5 * ROW_GROUP_ROWS + 5, 300)
    data, offsets = coded(weight)
    parts = [
        coded(weight[first : first + 2 * ROW_GROUP_ROWS])[0] for first in range(0, 65, 2 * ROW_GROUP_ROWS)
    ]
    assert b"".join(parts) == data
    some = decoded(data, offsets[2:], (41, 300))
    assert some == bits(weight[2 * ROW_GROUP_ROWS :])


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 66])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_with_coded_weights_has_the_bits_of_the_plain_one(
    monkeypatch: pytest.MonkeyPatch, rows: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(runner.kernel.matmul, "WORTH_SHARING", 0)
    weight = normal(*shape, seed=rows)
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(3))
    data, offsets = coded(weight)
    expected, found = torch.zeros(rows, shape[0]), torch.zeros(rows, shape[0])
    Kernel(torch.bfloat16, workers(2)).accumulate(x, weight, expected)
    kernel = Kernel(dtype, workers(2))
    kernel.accumulate_coded(x, torch.frombuffer(data, dtype=torch.uint8), torch.tensor(offsets), found)
    assert torch.equal(found, expected)


def test_what_does_not_fit_is_refused() -> None:
    weight = normal(30, 64)
    data, offsets = coded(weight)
    for wrong in (offsets[:-1], [*offsets[:-1], len(data) + 1], offsets[::-1], [-1, *offsets[1:]]):
        with pytest.raises(ValueError, match="do not hold"):
            decoded(data, wrong, (30, 64))
        with pytest.raises(ValueError, match="no offsets"):
            _product(data, wrong, 30, 64)
    with pytest.raises(ValueError, match="are no rows"):
        encode_row_groups(bits(weight)[:-2], 64)


def test_damage_never_reaches_other_memory() -> None:
    """Flipped and random bytes, right before a page that no one may touch."""
    weight = normal(ROW_GROUP_ROWS + 3, PANEL_COLUMNS + 70)
    data, offsets = coded(weight)
    generator = random.Random(0)
    found = {"damaged": 0, "decoded": 0}
    with Guarded(len(data)) as guarded:
        for attempt in range(400):
            guarded[:] = data
            for _ in range(1 + attempt % 5):
                place = generator.choice([generator.randrange(len(data)), generator.randrange(HEADER)])
                guarded[place] = generator.randrange(256)
            if attempt % 10 == 0:
                guarded[:] = generator.randbytes(len(data))
            try:
                decode_row_groups(guarded, offsets, *weight.shape, bytearray(weight.nbytes))
                found["decoded"] += 1
            except ValueError:
                found["damaged"] += 1
    assert all(found.values())


def test_a_damaged_chunk_is_an_error_in_a_product() -> None:
    data, offsets = coded(normal(30, 64))
    data[offsets[1] : offsets[1] + 4] = b"\xff" * 4
    with pytest.raises(ValueError, match="damaged"):
        _product(data, offsets, 30, 64)


def _product(data: bytearray, offsets: list[int], rows: int, columns: int) -> None:
    coded_bytes = torch.frombuffer(data, dtype=torch.uint8)
    out = torch.zeros(1, rows)
    kernel = Kernel(torch.bfloat16, workers(1))
    kernel.accumulate_coded(torch.ones(1, columns), coded_bytes, torch.tensor(offsets), out)
