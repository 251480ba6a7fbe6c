"""The product: right within rounding, and the same bits in any company, cut, and number of threads."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import runner.kernel.matmul
from runner.kernel.matmul import COLUMN_CHUNK, LANES, OUTPUTS_IN_CACHE, ROWS_IN_CACHE, Kernel
from runner.kernel.threads import workers

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROWS = [*range(1, 14), *range(ROWS_IN_CACHE - 1, ROWS_IN_CACHE + 3)]
ODD = [1, 7, 8, 9, 1023, 1024, 1025, 1033]
QUICK = settings(max_examples=60, deadline=None)


@pytest.fixture(autouse=True, scope="module")
def shared_however_small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.kernel.matmul, "WORTH_SHARING", 0)
        yield


def kernel(dtype: torch.dtype = torch.bfloat16, threads: int = 1) -> Kernel:
    return Kernel(dtype, workers(threads))


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def product(weight: torch.Tensor, x: torch.Tensor, threads: int = 1) -> torch.Tensor:
    out = torch.zeros(len(x), len(weight))
    kernel(weight.dtype, threads).accumulate(x, weight, out)
    return out


def assert_close(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, before: torch.Tensor) -> None:
    """Within what K + 1 roundings to float32 can add up to; Higham, Accuracy and Stability, section 3.1."""
    exact = before.double() + x.double() @ weight.double().mT
    sizes = before.double().abs() + x.double().abs() @ weight.double().abs().mT
    roundings = (x.shape[-1] + 1) * 2.0**-24
    assert ((out.double() - exact).abs() <= roundings / (1 - roundings) * sizes).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", ROWS)
def test_any_number_of_rows_is_right(dtype: torch.dtype, T: int) -> None:
    x, weight, before = random(T, 265), random(29, 265, dtype=dtype, seed=1), random(T, 29, seed=2)
    out = before.clone()
    kernel(dtype).accumulate(x, weight, out)
    assert_close(out, x, weight, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [*ODD, COLUMN_CHUNK - 1, COLUMN_CHUNK, COLUMN_CHUNK + 1, 2 * COLUMN_CHUNK + 9])
@pytest.mark.parametrize("N", [1, 7, 8, 9])
def test_any_number_of_columns_is_right(dtype: torch.dtype, K: int, N: int) -> None:
    x, weight = random(5, K), random(N, K, dtype=dtype, seed=1)
    assert_close(product(weight, x), x, weight, torch.zeros(5, N))


@pytest.mark.parametrize("N", [*ODD, OUTPUTS_IN_CACHE - 1, OUTPUTS_IN_CACHE + 1])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_outputs_is_right(N: int, threads: int) -> None:
    x, weight = random(6, 41), random(N, 41, dtype=torch.bfloat16, seed=1)
    assert_close(product(weight, x, threads), x, weight, torch.zeros(6, N))


@QUICK
@given(st.sampled_from(DTYPES), st.integers(0, 70), st.integers(0, 40), st.integers(0, 90), st.integers(1, 3))
def test_any_shape_is_right(dtype: torch.dtype, T: int, N: int, K: int, threads: int) -> None:
    x, weight = random(T, K), random(N, K, dtype=dtype, seed=1)
    out = product(weight, x, threads)
    assert_close(out, x, weight, torch.zeros(T, N))


@QUICK
@given(st.data())
def test_strided_weights_and_sums_touch_nothing_else(data: st.DataObject) -> None:
    T, N, K = (data.draw(st.integers(1, most)) for most in (9, 15, 40))
    wider = [data.draw(st.integers(0, 5)) for _ in range(3)]
    dtype = data.draw(st.sampled_from(DTYPES))
    x, weight = random(T, K + wider[0]), random(N, K + wider[1], dtype=dtype, seed=1)
    canvas = random(T, N + wider[2], seed=2)
    before = canvas.clone()
    kernel(dtype).accumulate(x[:, wider[0] :], weight[:, wider[1] :], canvas[:, :N])
    assert_close(canvas[:, :N], x[:, wider[0] :], weight[:, wider[1] :], before[:, :N])
    assert torch.equal(canvas[:, N:], before[:, N:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    K = COLUMN_CHUNK + 21
    x, weight = random(2 * ROWS_IN_CACHE + 3, K), random(31, K, dtype=dtype, seed=1)
    whole = product(weight, x)
    assert torch.equal(torch.cat([product(weight, row[None]) for row in x]), whole)
    for T in (2, 3, 4, 5, 7, ROWS_IN_CACHE, ROWS_IN_CACHE + 1):
        assert torch.equal(torch.cat([product(weight, rows) for rows in x.split(T)]), whole)
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    assert torch.equal(product(weight, x[shuffled]), whole[shuffled])


@QUICK
@given(st.data())
def test_bits_depend_on_no_cut_and_no_threads(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    T, N, K = (data.draw(st.integers(1, most)) for most in (12, 60, 70))
    threads = data.draw(st.integers(1, 4))
    cuts = sorted(data.draw(st.sets(st.integers(1, N))) | {0, N})
    x, weight = random(T, K), random(N, K, dtype=dtype, seed=1)
    out = torch.zeros(T, N)
    for first, last in pairwise(cuts):
        kernel(dtype, threads).accumulate(x, weight[first:last], out[:, first:last])
    assert torch.equal(out, product(weight, x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_of_a_sum_is_the_documented_one(dtype: torch.dtype) -> None:
    """Lanes over each chunk of columns, folded in halves, the rest one by one, the chunks one after another."""
    K = 2 * COLUMN_CHUNK + 2 * LANES + 3
    x, weight = random(1, K), random(3, K, dtype=dtype, seed=1)

    def fused(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        # Exact in double save for the addition; where that rounds to a tie of float32, the bits could differ.
        return (a.double() * b.double() + c.double()).float()

    expected = torch.zeros(3)
    for start in range(0, K, COLUMN_CHUNK):
        a, b = x[0, start : start + COLUMN_CHUNK], weight[:, start : start + COLUMN_CHUNK].float()
        whole = a.numel() // LANES * LANES
        lanes = torch.zeros(3, LANES)
        for k in range(0, whole, LANES):
            lanes = fused(a[k : k + LANES], b[:, k : k + LANES], lanes)
        while lanes.shape[1] > 1:
            half = lanes.shape[1] // 2
            lanes = lanes[:, :half] + lanes[:, half:]
        sums = lanes[:, 0]
        for k in range(whole, a.numel()):
            sums = fused(a[k], b[:, k], sums)
        expected = expected + sums
    assert torch.equal(product(weight, x)[0], expected)


@QUICK
@given(st.data())
def test_zeros_up_to_whole_lanes_change_nothing(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    K, more = data.draw(st.integers(1, 8)) * LANES, data.draw(st.integers(1, 6)) * LANES
    x, weight = random(3, K), random(10, K, dtype=dtype, seed=1)
    longer = torch.nn.functional.pad
    assert torch.equal(product(longer(weight, (0, more)), longer(x, (0, more))), product(weight, x))
    # A masked position has weight 0 in x, and something in the cache.
    garbage = torch.cat([weight, random(10, more, dtype=dtype, seed=5)], dim=1)
    assert torch.equal(product(garbage, longer(x, (0, more))), product(weight, x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("column", [0, 7, 8, 18])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_reaches_its_own_sums_alone(dtype: torch.dtype, column: int, value: float) -> None:
    x, weight = random(6, 19).abs() + 0.5, random(14, 19, dtype=dtype, seed=1).abs() + 0.5
    clean = product(weight, x)
    for place, spoiled in ((x, (2, slice(None))), (weight, (slice(None), 5))):
        row = place[2 if place is x else 5]
        kept = row[column].clone()
        row[column] = value
        found = product(weight, x)
        row[column] = kept
        assert torch.equal(found[spoiled], torch.full_like(found[spoiled], value)) or (
            math.isnan(value) and found[spoiled].isnan().all()
        )
        found[spoiled] = clean[spoiled]
        assert torch.equal(found, clean)


def test_every_stored_number_is_widened_exactly() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        weight = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)[:, None]
        finite = weight[weight.isfinite().squeeze()]
        padded = torch.nn.functional.pad(finite, (0, LANES))  # once behind the lanes, once in them
        assert torch.equal(product(finite, torch.ones(1, 1))[0], finite.float()[:, 0])
        ones = torch.ones(1, 1 + LANES)
        assert torch.equal(product(padded, ones)[0], finite.float()[:, 0])


@pytest.mark.parametrize(("T", "N", "K"), [(0, 3, 5), (3, 0, 5), (3, 4, 0), (0, 0, 0)])
@pytest.mark.parametrize("threads", [1, 3])
def test_empty_products_leave_the_sums(T: int, N: int, K: int, threads: int) -> None:
    out = random(T, N)
    before = out.clone()
    kernel(threads=threads).accumulate(torch.zeros(T, K), torch.zeros(N, K, dtype=torch.bfloat16), out)
    assert torch.equal(out, before)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_rows_that_are_not_dense_are_refused(which: int) -> None:
    tensors = [torch.zeros(4, 4), torch.zeros(4, 4, dtype=torch.bfloat16), torch.zeros(4, 4)]
    tensors[which] = tensors[which].T
    with pytest.raises(ValueError, match="must be dense"):
        kernel().accumulate(*tensors)
    with pytest.raises(ValueError, match="must be dense"):
        kernel().accumulate(*[tensor[None] for tensor in tensors])


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(5, 3, 9, 16), (1, 1, 1, 8), (4, 65, 40, 64), (7, 2, 300, 80)])
def test_batches_are_their_products(threads: int, shape: tuple[int, ...]) -> None:
    B, T, N, K = shape
    x, room = random(B, T, K), random(B, N + 5, K + 8, dtype=torch.bfloat16, seed=1)
    weight = room[:, :N, :K]
    out = torch.zeros(B, T, N)
    kernel(threads=threads).accumulate(x, weight, out)
    assert torch.equal(out, torch.stack([product(each, rows) for each, rows in zip(weight, x, strict=True)]))


@pytest.mark.parametrize("T", [1, 3, 70])
def test_shared_or_not_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch, T: int) -> None:
    x, weight = random(T, 100), random(700, 100, dtype=torch.bfloat16, seed=1)
    shared = product(weight, x, threads=3)
    monkeypatch.setattr(runner.kernel.matmul, "WORTH_SHARING", 2**60)
    assert torch.equal(product(weight, x, threads=3), shared)


def test_shapes_that_do_not_fit_are_refused() -> None:
    weight = torch.zeros(4, 6, dtype=torch.bfloat16)
    for x, out in [((2, 5), (2, 4)), ((2, 6), (2, 5)), ((2, 6), (3, 4))]:
        with pytest.raises(ValueError, match="does not give"):
            kernel().accumulate(torch.zeros(x), weight, torch.zeros(out))


def test_products_of_several_callers_at_once_are_right() -> None:
    x, weight = random(3, 64), random(500, 64, dtype=torch.bfloat16, seed=1)
    expected = product(weight, x)
    wrong = []

    def compute() -> None:
        wrong.extend(1 for _ in range(200) if not torch.equal(product(weight, x, threads=3), expected))

    callers = [threading.Thread(target=compute, daemon=True) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(30)
        assert not caller.is_alive()
    assert not wrong
