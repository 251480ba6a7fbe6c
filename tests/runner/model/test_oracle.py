"""The runner against transformers' BloomForCausalLM on the same weights: logits and tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import BloomConfig, BloomForCausalLM

import runner
from runner.generation.model import Model
from runner.kernel.matmul import Kernel
from runner.kernel.product import LANES
from runner.kernel.threads import workers

STEPS = 64
# Sums in another order differ by a step of the dtype here and there, and what is computed from them by a few.
CLOSE = {
    torch.bfloat16: {"rtol": 0.02, "atol": 0.02},
    torch.float16: {"rtol": 0.002, "atol": 0.002},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
}
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
def reference_steps(model: BloomForCausalLM, ids: list[int]) -> tuple[list[torch.Tensor], list[int]]:
    """Logits of the prompt [T, V] and of `STEPS` cached greedy steps [1, V] each, and the tokens."""
    output = model(torch.tensor([ids]), use_cache=True)
    logits = [output.logits[0]]
    for _ in range(STEPS):
        token = torch.tensor([[logits[-1][-1].float().argmax()]])
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits[0])
    return logits, [int(step[-1].float().argmax()) for step in logits]


def own_steps(model: Model, ids: list[int]) -> tuple[list[torch.Tensor], list[int]]:
    """The same of the runner."""
    cache = model.cache(len(ids) + STEPS)
    logits = [model.forward(ids, cache, all_rows=True)]
    for _ in range(STEPS):
        logits.append(model.forward([int(logits[-1][-1].float().argmax())], cache))
    return logits, [int(step[-1].float().argmax()) for step in logits]


def in_whole_lanes(x: torch.Tensor) -> torch.Tensor:
    """[..., K] with zeros up to a K that is a multiple of the kernel's lanes, in float32."""
    return F.pad(x.float(), (0, -x.shape[-1] % LANES)).contiguous()


@pytest.fixture
def own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have transformers compute its products with the runner's kernel, and everything else as ever."""

    def summed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[B, T, K], [B, N, K] -> [B, T, N] float32."""
        kernel = Kernel(weight.dtype, workers(2))
        out = torch.zeros(*x.shape[:2], weight.shape[1])
        kernel.accumulate(in_whole_lanes(x), in_whole_lanes(weight).to(weight.dtype), out)
        return out

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        out = torch.zeros(x.numel() // x.shape[-1], len(weight))
        if bias is not None:
            out += bias.float()
        Kernel(weight.dtype, workers(2)).accumulate(x.float().view(-1, x.shape[-1]), weight, out)
        return out.view(*x.shape[:-1], len(weight)).to(x.dtype)

    def baddbmm(alibi, batch1, batch2, *, beta, alpha):
        assert beta == 1.0
        return (summed(batch1, batch2.transpose(1, 2)) * alpha + alibi.float()).to(batch1.dtype)

    def bmm(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return summed(x, y.transpose(1, 2)).to(x.dtype)

    monkeypatch.setattr(F, "linear", linear)
    monkeypatch.setattr(torch.Tensor, "baddbmm", baddbmm)
    monkeypatch.setattr(torch, "bmm", bmm)


def compare(source: Path, directory: Path, dtype: torch.dtype, ids: list[int], *, exactly: bool) -> list[int]:
    """Assert that all logits are equal, or close, and the tokens equal; the tokens."""
    expected, expected_tokens = reference_steps(reference(source, dtype), ids)
    found, tokens = own_steps(runner.load(directory), ids)
    assert tokens == expected_tokens
    for step, (own, other) in enumerate(zip(found, expected, strict=True)):
        if exactly:
            assert torch.equal(own, other), f"step {step}"
        torch.testing.assert_close(
            own, other, msg=lambda text, step=step: f"step {step}: {text}", **CLOSE[dtype]
        )
    return tokens


# 6 heads take the ALiBi branch of the real model's 112, 8 heads that of a power of two.
@pytest.mark.parametrize("heads", [6, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_and_tokens_are_those_of_transformers(prepared, dtype: str, heads: int) -> None:
    check_synthetic(prepared, dtype, heads, exactly=False)


@pytest.mark.parametrize("heads", [6, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_but_the_order_of_sums_is_that_of_transformers(
    prepared, own_products, dtype: str, heads: int
) -> None:
    check_synthetic(prepared, dtype, heads, exactly=True)


def check_synthetic(prepared, dtype: str, heads: int, *, exactly: bool) -> None:
    source, directory = prepared(dtype=dtype, heads=heads, hidden_size=24 * heads)
    ids = torch.randint(4, 1200, (17,), generator=torch.Generator().manual_seed(heads)).tolist()
    tokens = compare(source, directory, DTYPES[dtype], ids, exactly=exactly)
    assert len(set(tokens)) > 8, "weights whose output repeats itself would prove little"


MINIATURE_PROMPT = "The SQL command to list all the books whose year is 1999 is:"


def test_miniature(miniature) -> None:
    source, directory = miniature
    ids = runner.load(directory).tokenizer.encode(MINIATURE_PROMPT)
    compare(source, directory, torch.bfloat16, ids, exactly=False)


def test_miniature_exactly(miniature, own_products) -> None:
    source, directory = miniature
    ids = runner.load(directory).tokenizer.encode(MINIATURE_PROMPT)
    compare(source, directory, torch.bfloat16, ids, exactly=True)


def test_residual_after_layernorm(prepared, own_products, tmp_path: Path) -> None:
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
    compare(changed, tmp_path / "bloom", torch.bfloat16, [5, 6, 7, 8], exactly=True)


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
