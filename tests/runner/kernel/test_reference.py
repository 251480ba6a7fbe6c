"""The kernel against its scalar twins in reference.py, in memory that ends before a page that nobody may touch."""

from __future__ import annotations

import math
import random
import struct
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import runner.kernel.matmul
from runner.kernel.decode import decode_row_groups
from runner.kernel.encode import encode_row_groups
from runner.kernel.matmul import Kernel
from runner.kernel.threads import workers
from tests.runner.kernel import reference
from tests.support.guarded import Guarded

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SOME = settings(max_examples=60, deadline=None)
# Beside ordinary numbers: what overflows, what underflows, what is no number.
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 3e38, -3e38, 1e-38, -1e-40, 1e-45, 65504.0, 6e-8]


@st.composite
def numbers(draw: st.DrawFn, *shape: int) -> torch.Tensor:
    """Numbers of one scale, some of them special."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    found = torch.randn(shape, generator=generator) * draw(st.sampled_from([1.0, 1e-3, 1e-19, 1e-30, 1e15]))
    for _ in range(draw(st.integers(0, 3)) if found.numel() else 0):
        place = draw(st.integers(0, found.numel() - 1))
        found.view(-1)[place] = draw(st.sampled_from(SPECIAL))
    return found


def guarded(tensor: torch.Tensor) -> tuple[torch.Tensor, Guarded]:
    """A copy whose last byte lies before a page that cannot be read, and what holds its memory."""
    if not tensor.numel():
        return tensor.clone(), Guarded(1)
    memory = Guarded(tensor.nbytes)
    copy = torch.frombuffer(memory.__enter__(), dtype=tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor), memory


def same(found: float, expected: float) -> bool:
    """The same bits, save that one NaN is as good as another."""
    both = math.isnan(found) and math.isnan(expected)
    return both or struct.pack("f", found) == struct.pack("f", expected)


@SOME
@given(st.data())
def test_a_product_has_the_bits_of_the_reference(data: st.DataObject) -> None:
    T, N, K = data.draw(st.integers(0, 11)), data.draw(st.integers(0, 15)), data.draw(st.integers(0, 35))
    dtype = data.draw(st.sampled_from(DTYPES))
    tensors = [data.draw(numbers(T, K)), data.draw(numbers(N, K)).to(dtype), data.draw(numbers(T, N))]
    expected = [
        [
            reference.dot(row, weights, before)
            for weights, before in zip(tensors[1].tolist(), sums, strict=True)
        ]
        for row, sums in zip(tensors[0].tolist(), tensors[2].tolist(), strict=True)
    ]
    (x, _), (weight, _), (out, _) = held = [guarded(tensor) for tensor in tensors]
    Kernel(dtype, workers(1)).accumulate(x, weight, out)
    for row, wanted in zip(out.tolist(), expected, strict=True):
        assert all(map(same, row, wanted)), (row, wanted)
    release(held)


def test_what_underflows_keeps_its_sign() -> None:
    """The last of these products rounds to -0, and so does their sum with -0."""
    x, weight, out = torch.tensor([[1e-19, -1e-20]]), torch.tensor([[1e-31, 1e-31]]), torch.tensor([[-0.0]])
    assert math.copysign(1, reference.dot(x[0].tolist(), weight[0].tolist(), -0.0)) == -1
    Kernel(torch.float32, workers(1)).accumulate(x, weight, out)
    assert math.copysign(1, out.item()) == -1


def release(held: list[tuple[torch.Tensor, Guarded]]) -> None:
    for _, memory in held:
        memory.__exit__()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [4095, 4096, 4105])
def test_a_long_product_has_the_bits_of_the_reference(dtype: torch.dtype, K: int) -> None:
    generator = torch.Generator().manual_seed(K)
    x, weight = torch.randn(2, K, generator=generator), torch.randn(3, K, generator=generator).to(dtype)
    out = torch.zeros(2, 3)
    Kernel(dtype, workers(1)).accumulate(x, weight, out)
    assert out.tolist() == [
        [reference.dot(row, weights, 0.0) for weights in weight.tolist()] for row in x.tolist()
    ]


@st.composite
def matrices(draw: st.DrawFn) -> list[list[int]]:
    """Rows of bfloat16 bits, of few exponents or many."""
    count, columns = draw(st.integers(1, 26)), draw(st.sampled_from([1, 7, 16, 63, 64, 65, 100, 4097]))
    count = min(count, 3) if columns > 4000 else count
    generator, kinds = random.Random(draw(st.integers(0, 2**32))), draw(st.sampled_from([1, 2, 9, 30, 256]))
    falling = [2.0 ** -(place * draw(st.sampled_from([0, 0.5, 1, 3]))) for place in range(kinds)]
    exponents = generator.choices(generator.sample(range(256), kinds), weights=falling, k=count * columns)
    bits = [each << 7 | generator.getrandbits(7) | generator.getrandbits(1) << 15 for each in exponents]
    return [bits[row * columns : (row + 1) * columns] for row in range(count)]


@settings(max_examples=25, deadline=None)
@given(matrices())
def test_coded_bytes_are_those_of_the_reference(rows: list[list[int]]) -> None:
    columns = len(rows[0])
    raw = struct.pack(f"<{len(rows) * columns}H", *(weight for row in rows for weight in row))
    groups = [rows[first : first + 12] for first in range(0, len(rows), 12)]
    expected = [b"".join(reference.encoded(panel) for panel in reference.panels(group)) for group in groups]
    with Guarded(len(raw)) as held:
        held[:] = raw
        data, lengths = encode_row_groups(held, columns)
    assert (data, lengths) == (b"".join(expected), [len(each) for each in expected])
    for group, (start, _) in zip(groups, pairwise([0, *accumulate(lengths)]), strict=True):
        first = reference.panels(group)[0]
        assert reference.decoded(data[start:], len(first)) == first
    with Guarded(len(data)) as coded, Guarded(len(raw)) as out:
        coded[:] = data
        decode_row_groups(coded, [0, *accumulate(lengths)], len(rows), columns, out)
        assert bytes(out) == raw


@SOME
@given(st.data())
def test_a_coded_product_has_the_bits_of_the_plain_one(data: st.DataObject) -> None:
    N, T = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 10))
    K = data.draw(st.sampled_from([1, 8, 24, 65, 100, 4096, 4105]))
    weight, x = data.draw(numbers(N, K)).bfloat16(), data.draw(numbers(T, K))
    coded, lengths = encode_row_groups(bytearray(weight.view(torch.int16).numpy().tobytes()), K)
    (x, _), (stored, _) = held = [
        guarded(x), guarded(torch.frombuffer(bytearray(coded), dtype=torch.uint8))
    ]  # fmt: skip
    expected, found, kernel = torch.zeros(T, N), torch.zeros(T, N), Kernel(torch.bfloat16, workers(1))
    kernel.accumulate(x, weight, expected)
    kernel.accumulate_coded(x, stored, torch.tensor([0, *accumulate(lengths)]), found)
    assert all(map(same, found.flatten().tolist(), expected.flatten().tolist()))
    release(held)


def test_shared_work_is_what_these_tests_run() -> None:
    assert runner.kernel.matmul.LANES == reference.LANES
    assert runner.kernel.matmul.COLUMN_CHUNK == reference.CHUNK
