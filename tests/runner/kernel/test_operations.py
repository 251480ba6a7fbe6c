"""What lies between the products: the bits of the scalar reference, and what the reference implementation computes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import runner.kernel.matmul
import runner.kernel.operations
from runner.kernel import operations
from runner.kernel.matmul import Finish, Kernel
from runner.kernel.threads import workers
from tests.runner.kernel import reference
from tests.support.guarded import Guarded

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SOME = settings(max_examples=40, deadline=None)
EPSILON = 1e-5


@pytest.fixture(autouse=True, scope="module")
def shared_however_small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.kernel.matmul, "WORTH_SHARING", 0)
        patch.setattr(runner.kernel.operations, "WORTH_SHARING", 0)
        yield


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def kernel(dtype: torch.dtype, threads: int = 2) -> Kernel:
    return Kernel(dtype, workers(threads))


def random(dtype: torch.dtype, *shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Float32 numbers that the dtype has."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype).float()


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose last byte lies before a page that cannot be read, for the rest of the process."""
    memory = Guarded(max(1, tensor.nbytes))
    held = memory.__enter__()
    if not tensor.numel():
        return tensor.clone()
    return torch.frombuffer(held, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """The same bits, save that one NaN is as good as another."""
    both = found.isnan() & expected.isnan()
    return bool((both | (found.view(torch.int32) == expected.view(torch.int32))).all())


def gelu(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """GELU of float32 numbers that the dtype has, as a product gives it."""
    out = torch.empty(1, x.numel())
    finish = Finish(bias=x.to(dtype).view(-1), activates=True)
    kernel(dtype).accumulate(torch.empty(1, 0), torch.empty(x.numel(), 0, dtype=dtype), out, finish)
    return out.view(x.shape)


def every_number(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()


def exact_gelu(x: torch.Tensor) -> torch.Tensor:
    """The reference implementation's, with tanh of float64 in place of the one of this processor."""

    def tanh(value: torch.Tensor) -> torch.Tensor:
        return torch.tanh(value.double()).float().to(value.dtype)

    return x * 0.5 * (1.0 + tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gelu_of_every_number_is_the_exact_one(dtype: torch.dtype) -> None:
    x = every_number(dtype)
    assert same(gelu(x, dtype), exact_gelu(x.to(dtype)).float())


def test_gelu_of_float32_is_the_exact_one_but_for_ties() -> None:
    """tanh has 40 good bits; so float32 has another last bit only where the 25th to 40th say nothing."""
    x = torch.cat([random(torch.float32, 2**16, seed=1, scale=scale) for scale in (3.0, 1e-3, 1e-20, 30.0)])
    found, expected = gelu(x, torch.float32), exact_gelu(x)
    assert (found != expected).sum() <= 8
    assert torch.allclose(found, expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_has_the_bits_of_the_reference(dtype: torch.dtype) -> None:
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -1e-40, 3e38, 65504.0, -20.0, 9.0]
    x = torch.cat([torch.tensor(special), random(dtype, 400, scale=2.0)]).to(dtype).float()
    expected = torch.tensor([reference.gelu(name(dtype), value) for value in x.tolist()])
    assert same(gelu(x, dtype), expected)


@SOME
@given(st.data())
def test_a_finished_product_has_the_bits_of_the_reference(data: st.DataObject) -> None:
    dtype, threads = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(1, 3))
    T, N, K = (data.draw(st.integers(1, most)) for most in (5, 30, 20))
    x, weight, bias = random(dtype, T, K), random(dtype, N, K, seed=1), random(dtype, N, seed=2)
    residual, activates = random(dtype, T, N, seed=3), data.draw(st.booleans())
    has_bias, adds, rounds = (data.draw(st.booleans()) for _ in range(3))
    expected = []
    for t, n in itertools.product(range(T), range(N)):
        begins = bias[n].item() if has_bias else 0.0
        value = reference.dot(x[t].tolist(), weight[n].tolist(), begins)
        if rounds:
            value = reference.rounded(name(dtype), value)
            value = reference.gelu(name(dtype), value) if activates else value
            if adds:
                value = reference.rounded(name(dtype), reference.added(residual[t, n].item(), value))
        expected.append(value)
    finish = Finish(
        guarded(bias.to(dtype)) if has_bias else None, rounds, activates, guarded(residual) if adds else None
    )
    out = guarded(torch.full((T, N), math.nan))
    kernel(dtype, threads).accumulate(x, weight.to(dtype), out, finish)
    assert same(out, torch.tensor(expected).view(T, N))


def test_parts_of_a_finish_are_its_columns() -> None:
    bias, residual = torch.arange(6.0), torch.arange(12.0).view(2, 6)
    part = Finish(bias, activates=True, residual=residual).part(2, 5)
    assert part.bias.tolist() == [2, 3, 4] and part.residual.tolist() == [[2, 3, 4], [8, 9, 10]]
    assert part.activates and part.rounds
    assert Finish().part(0, 1) == Finish()


@SOME
@given(st.data())
def test_layer_norm_has_the_bits_of_the_reference(data: st.DataObject) -> None:
    dtype, threads = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(1, 3))
    T, E = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 40))
    scale = data.draw(st.sampled_from([1.0, 100.0, 1e-4]))
    x, weight = random(dtype, T, E, scale=scale), random(dtype, E, seed=1)
    bias = random(dtype, E, seed=2)
    if T and data.draw(st.booleans()):
        x[0, -1] = data.draw(st.sampled_from([math.nan, math.inf, 3e38]))
    expected = [
        reference.layer_norm(name(dtype), row, weight.tolist(), bias.tolist(), EPSILON) for row in x.tolist()
    ]
    vectors = guarded(weight.to(dtype)), guarded(bias.to(dtype))
    found = operations.layer_norm(kernel(dtype, threads), guarded(x), *vectors, EPSILON)
    assert same(found, torch.tensor(expected).view(T, E))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_is_that_of_float64(dtype: torch.dtype) -> None:
    x, weight, bias = (random(dtype, *shape, seed=len(shape)) for shape in ((7, 1000), (1000,), (1000,)))
    found = operations.layer_norm(kernel(dtype), x, weight.to(dtype), bias.to(dtype), EPSILON)
    exact = F.layer_norm(x.double(), (1000,), weight.double(), bias.double(), EPSILON)
    assert (found == exact.float().to(dtype).float()).float().mean() > 0.9999
    assert torch.allclose(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-30)


@SOME
@given(st.data())
def test_attention_weights_have_the_bits_of_the_reference(data: st.DataObject) -> None:
    dtype, threads = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(1, 3))
    H, T, S = (
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 4)),
        data.draw(st.sampled_from([8, 16, 24])),
    )
    products = random(torch.float32, H, T, S, scale=data.draw(st.sampled_from([1.0, 30.0, 1e4])))
    alibi, start = random(dtype, H, S, seed=1), data.draw(st.integers(0, S - T))
    if data.draw(st.booleans()):
        products[0, 0, 0] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf, 3e38]))
    # The kernel scales in float32.
    scale = torch.tensor(0.12345).item()
    expected = [
        reference.attention_weights(name(dtype), products[h, t].tolist(), alibi[h].tolist(), start + t, scale)
        for h, t in itertools.product(range(H), range(T))
    ]
    found = guarded(products)
    operations.attend(kernel(dtype, threads), found, guarded(alibi), start, 0.12345)
    assert same(found, torch.tensor(expected).view(H, T, S))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_weights_are_those_of_float64(dtype: torch.dtype) -> None:
    products = random(torch.float32, 3, 5, 64, scale=3.0)
    alibi, start = random(dtype, 3, 64, seed=1), 40
    scores = (products * 0.25 + alibi[:, None]).to(dtype).double()
    later = torch.arange(64) > start + torch.arange(5)[:, None]
    exact = F.softmax(scores.masked_fill(later, -math.inf), dim=-1)
    operations.attend(kernel(dtype), products, alibi, start, 0.25)
    assert (products[:, later] == 0).all()
    assert torch.allclose(products.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-30)


def test_scores_that_are_no_whole_lanes_are_refused() -> None:
    with pytest.raises(ValueError, match="no scores of whole lanes"):
        operations.attend(kernel(torch.float32), torch.zeros(1, 1, 9), torch.zeros(1, 9), 0, 1.0)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_and_values_are_stored_in_their_places_and_nowhere_else(
    dtype: torch.dtype, threads: int
) -> None:
    T, H, D, capacity, first = 3, 4, 5, 16, 7
    fused = random(dtype, T, H, 3, D)
    keys, values = torch.ones(H, capacity, D, dtype=dtype), torch.ones(H, D, capacity, dtype=dtype)
    wanted = keys.clone(), values.clone()
    wanted[0][:, first : first + T] = fused[:, :, 1].transpose(0, 1)
    wanted[1][:, :, first : first + T] = fused[:, :, 2].permute(1, 2, 0)
    operations.store(kernel(dtype, threads), fused, keys, values, first)
    assert torch.equal(keys, wanted[0]) and torch.equal(values, wanted[1])


def test_what_is_no_number_stays_none_in_the_cache() -> None:
    for dtype in DTYPES:
        fused = torch.full((1, 1, 3, 1), math.nan)
        keys, values = torch.zeros(1, 8, 1, dtype=dtype), torch.zeros(1, 1, 8, dtype=dtype)
        operations.store(kernel(dtype), fused, keys, values, 0)
        assert keys[0, 0].isnan().all() and values[0, :, 0].isnan().all()
