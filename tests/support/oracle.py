"""transformers as the oracle: its model of a source as found, and its products computed with the runner's kernel."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import BloomForCausalLM
from transformers.models.bloom import modeling_bloom

import runner
from runner.kernel import operations
from runner.kernel.matmul import LANES, Finish, Kernel
from runner.kernel.threads import workers
from scripts.fakehub.checkpoint import Layout, synthetic

SHAPE = {"hidden_size": 48, "heads": 6, "blocks": 2, "vocab_size": 300}
IDS = [5, 6, 7, 8, 9, 250, *range(40, 51)]
NEW_TOKENS = 12

State = dict[str, torch.Tensor]


def in_whole_lanes(x: torch.Tensor) -> torch.Tensor:
    """[..., K] with zeros up to a K that is a multiple of the kernel's lanes, in float32."""
    return F.pad(x.float(), (0, -x.shape[-1] % LANES)).contiguous()


def use_own_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have transformers compute with the runner's kernel wherever torch's results depend on the processor.

    These are the products, LayerNorm, softmax, and tanh, with which GELU is replaced as a whole. What they are called
    with, and all that is added, scaled, masked and rounded in between, is the reference's own.
    """

    def summed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[B, T, K], [B, N, K] -> [B, T, N] float32."""
        out = torch.zeros(*x.shape[:2], weight.shape[1])
        kernel_of(weight).accumulate(in_whole_lanes(x), in_whole_lanes(weight).to(weight.dtype), out)
        return out

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        out = torch.zeros(x.numel() // x.shape[-1], len(weight))
        if bias is not None:
            out += bias.float()
        kernel_of(weight).accumulate(x.float().view(-1, x.shape[-1]), weight.contiguous(), out)
        return out.view(*x.shape[:-1], len(weight)).to(x.dtype)

    def baddbmm(alibi, batch1, batch2, *, beta, alpha):
        assert beta == 1.0
        return (summed(batch1, batch2.transpose(1, 2)) * alpha + alibi.float()).to(batch1.dtype)

    def bmm(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return summed(x, y.transpose(1, 2)).to(x.dtype)

    monkeypatch.setattr(F, "linear", linear)
    monkeypatch.setattr(torch.Tensor, "baddbmm", baddbmm)
    monkeypatch.setattr(torch, "bmm", bmm)
    monkeypatch.setattr(F, "layer_norm", own_layer_norm)
    monkeypatch.setattr(F, "softmax", own_softmax)
    monkeypatch.setattr(modeling_bloom, "bloom_gelu_forward", own_gelu)


def kernel_of(tensor: torch.Tensor) -> Kernel:
    return Kernel(tensor.dtype, workers(2))


def own_layer_norm(x: torch.Tensor, shape, weight: torch.Tensor, bias: torch.Tensor, epsilon: float):
    rows = x.float().reshape(-1, *shape)
    return (
        operations.layer_norm(kernel_of(x), rows, weight.contiguous(), bias.contiguous(), epsilon)
        .view(x.shape)
        .to(x.dtype)
    )


def own_softmax(scores: torch.Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Softmax over the last of four dimensions, in float32; what `.to(scores.dtype)` makes of it is the same bits."""
    *heads, T, S = scores.shape
    padded = F.pad(scores.float(), (0, -S % LANES), value=-torch.inf).view(-1, T, S + -S % LANES).contiguous()
    no_alibi = torch.zeros(padded.shape[::2])
    # No position comes after the rows: the scores are masked already.
    operations.attend(kernel_of(scores), padded, no_alibi, start=padded.shape[2], scale=1.0)
    return padded[:, :, :S].reshape(*heads, T, S)


def own_gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU as a product has it, of a sum over nothing that begins with a bias."""
    out = torch.empty(1, x.numel())
    nothing = torch.empty(x.numel(), 0, dtype=x.dtype)
    finish = Finish(bias=x.reshape(-1), activates=True)
    kernel_of(x).accumulate(torch.empty(1, 0), nothing, out, finish)
    return out.view(x.shape).to(x.dtype)


def plain_source(directory: Path, dtype: str = "bfloat16", **shape: int) -> State:
    """Write a small BLOOM as one safetensors file; its tensors."""
    layout = Layout(single=True, form="safetensors")
    synthetic(directory, **{**SHAPE, **shape}, dtype=dtype, layout=layout)
    return load_file(directory / "model.safetensors")


def write_source(
    directory: Path,
    like: Path,
    state: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    **saving: Any,
) -> Path:
    """A source with the small files of `like`, other fields in config.json, and `state` in one file.

    That is a .bin if `saving` has options of torch.save, or something else than tensors is to be saved.
    """
    shutil.copytree(like, directory, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    if saving or not all(isinstance(value, torch.Tensor) for value in state.values()):
        torch.save(state, directory / "pytorch_model.bin", **saving)
    else:
        copies = {key: tensor.detach().clone().contiguous() for key, tensor in state.items()}
        save_file(copies, directory / "model.safetensors", metadata={"format": "pt"})
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))
    return directory


def transformers_model(source: Path) -> BloomForCausalLM:
    """What `from_pretrained(dtype="auto")` makes of a source."""
    return BloomForCausalLM.from_pretrained(source, dtype="auto").eval()


@torch.inference_mode()
def expected_of(model: BloomForCausalLM) -> tuple[torch.Tensor, list[int]]:
    """Logits [T, V] of `IDS`, and the tokens that generate() appends to them."""
    ids = torch.tensor([IDS])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
    )
    return model(ids).logits[0], made[0, len(IDS) :].tolist()


def assert_runs_as(directory: Path, expected: tuple[torch.Tensor, list[int]]) -> None:
    """The prepared directory gives the same bits of logits, and the same tokens; under `use_own_arithmetic`."""
    logits, tokens = expected
    model = runner.load(directory)
    own = model.forward(IDS, model.cache(len(IDS)), all_rows=True)
    assert own.dtype == logits.dtype and torch.equal(own, logits)
    assert list(model.generate(IDS, max_new_tokens=NEW_TOKENS)) == tokens
