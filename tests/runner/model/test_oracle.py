"""The runner against transformers' BloomForCausalLM on the same weights: logits and tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import BloomConfig, BloomForCausalLM

import runner
from runner.generation.model import Model
from tests.support.oracle import use_own_arithmetic

STEPS = 64
ORDERS = 2  # further orders of summation in which the reference is computed
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def reference(source: Path, dtype: torch.dtype) -> BloomForCausalLM:
    """transformers' model with the weights of `source`, loaded by torch and not by anything of the project."""
    config = BloomConfig(**json.loads((source / "config.json").read_text()))
    state = {}
    for shard in source.glob("*.bin"):
        state.update(torch.load(shard, weights_only=True))
    model = BloomForCausalLM(config).to(dtype)
    model.transformer.load_state_dict(state)
    return model.eval()


@torch.inference_mode()
def reference_steps(
    model: BloomForCausalLM, ids: list[int], tokens: list[int] | None = None
) -> list[torch.Tensor]:
    """Logits of the prompt [T, V] and of `STEPS` cached steps [1, V] each: greedy ones, or along `tokens`."""
    output = model(torch.tensor([ids]), use_cache=True)
    logits = [output.logits[0]]
    for step in range(STEPS):
        token = tokens[step] if tokens else likeliest(logits[-1])
        output = model(torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits[0])
    return logits


def own_steps(model: Model, ids: list[int], tokens: list[int]) -> list[torch.Tensor]:
    """The same of the runner, along `tokens`."""
    cache = model.cache(len(ids) + STEPS)
    logits = [model.forward(ids, cache, all_rows=True)]
    return [*logits, *(model.forward([token], cache) for token in tokens[:STEPS])]


def likeliest(logits: torch.Tensor) -> int:
    """Id of the token that greedy decoding takes after the last row of logits [T, V]."""
    return int(logits[-1].float().argmax())


def spread(model: BloomForCausalLM, ids: list[int], expected: list[torch.Tensor], tokens: list[int]) -> float:
    """Largest difference between the reference's logits in some orders of summation.

    The columns of every weight matrix, and the inputs that they are multiplied with, are permuted. So the products are
    the same but for the order in which the processor sums them, and LayerNorm and softmax are those of float64, rounded
    once: which is what the runner does, too.
    """
    runs = [torch.cat(expected).float()]
    linear, layer_norm, softmax = F.linear, F.layer_norm, F.softmax

    def exact_layer_norm(x: torch.Tensor, shape, weight: torch.Tensor, bias: torch.Tensor, epsilon: float):
        return layer_norm(x.double(), shape, weight.double(), bias.double(), epsilon).to(x.dtype)

    def exact_softmax(scores: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
        return softmax(scores.double(), dim).to(dtype)

    for seed in range(ORDERS):

        def permuted(
            x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, seed: int = seed
        ) -> torch.Tensor:
            order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(seed))
            return linear(x[..., order].contiguous(), weight[:, order].contiguous(), bias)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "linear", permuted)
            patch.setattr(F, "layer_norm", exact_layer_norm)
            patch.setattr(F, "softmax", exact_softmax)
            runs.append(torch.cat(reference_steps(model, ids, tokens)).float())
    return max(float((one - other).abs().max()) for one, other in combinations(runs, 2))


@pytest.fixture
def own_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    use_own_arithmetic(monkeypatch)


def compare_exactly(source: Path, directory: Path, dtype: torch.dtype, ids: list[int]) -> list[int]:
    """Assert that all logits have the same bits; the tokens."""
    expected = reference_steps(reference(source, dtype), ids)
    tokens = [likeliest(step) for step in expected]
    for step, (own, other) in enumerate(
        zip(own_steps(runner.load(directory), ids, tokens), expected, strict=True)
    ):
        assert torch.equal(own, other), f"step {step}"
    return tokens


def compare(source: Path, directory: Path, dtype: torch.dtype, ids: list[int]) -> list[int]:
    """Assert that logits are as close, and tokens as equal, as the reference's own orders of summation; the tokens.

    torch sums in an order that depends on the processor. If its two likeliest tokens are closer together than that
    moves them, the reference has no token of its own; a third of the steps at least must have one.
    """
    model = reference(source, dtype)
    expected = reference_steps(model, ids)
    tokens = [likeliest(step) for step in expected]
    moved = spread(model, ids, expected, tokens)
    decided = 0
    for step, (own, other) in enumerate(
        zip(own_steps(runner.load(directory), ids, tokens), expected, strict=True)
    ):
        difference = float((own.float() - other.float()).abs().max())
        assert difference <= 2 * moved, f"step {step}: {difference} apart, the reference by itself {moved}"
        first, second = other[-1].float().topk(2).values
        if first - second > 2 * moved:
            decided += 1
            assert likeliest(own) == tokens[step], f"step {step}"
    assert decided > len(tokens) / 3
    return tokens


# 6 heads take the ALiBi branch of the real model's 112, 8 heads that of a power of two.
@pytest.mark.slow
@pytest.mark.parametrize("heads", [6, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_and_tokens_are_those_of_transformers(prepared, dtype: str, heads: int) -> None:
    check_synthetic(prepared, dtype, heads, compare)


@pytest.mark.parametrize("heads", [6, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_but_sums_and_functions_is_that_of_transformers(
    prepared, own_arithmetic, dtype: str, heads: int
) -> None:
    check_synthetic(prepared, dtype, heads, compare_exactly)


def check_synthetic(prepared, dtype: str, heads: int, check: Callable[..., list[int]]) -> None:
    source, directory = prepared(dtype=dtype, heads=heads, hidden_size=24 * heads)
    ids = torch.randint(4, 1200, (17,), generator=torch.Generator().manual_seed(heads)).tolist()
    tokens = check(source, directory, DTYPES[dtype], ids)
    assert len(set(tokens)) > 8, "weights whose output repeats itself would prove little"


MINIATURE_PROMPT = "The SQL command to list all the books whose year is 1999 is:"


@pytest.mark.slow
def test_miniature(miniature) -> None:
    source, directory = miniature
    ids = runner.load(directory).tokenizer.encode(MINIATURE_PROMPT)
    compare(source, directory, torch.bfloat16, ids)


@pytest.mark.slow
def test_miniature_exactly(miniature, own_arithmetic) -> None:
    source, directory = miniature
    ids = runner.load(directory).tokenizer.encode(MINIATURE_PROMPT)
    compare_exactly(source, directory, torch.bfloat16, ids)


def test_residual_after_layernorm(prepared, own_arithmetic, tmp_path: Path) -> None:
    """`apply_residual_connection_post_layernorm` changes the result as it does in transformers."""
    from toolkit.commands.convert import convert

    source, _ = prepared()
    changed = tmp_path / "source"
    changed.mkdir()
    for file in source.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    config["apply_residual_connection_post_layernorm"] = True
    (changed / "config.json").write_text(json.dumps(config))
    convert(changed, tmp_path / "bloom")
    compare_exactly(changed, tmp_path / "bloom", torch.bfloat16, [5, 6, 7, 8])


@pytest.mark.slow
def test_generate_gives_what_transformers_generates(miniature) -> None:
    source, directory = miniature
    model = runner.load(directory)
    prompt = "The Spanish translation of thank you for your help is:"
    ids = model.tokenizer.encode(prompt)
    expected = reference(source, torch.bfloat16).generate(
        torch.tensor([ids]), max_new_tokens=48, do_sample=False
    )
    generation = model.generate(prompt, max_new_tokens=48)
    assert list(generation) == expected[0, len(ids) :].tolist()
    assert generation.stop_reason == "eos"
