"""BLOOM for training the miniature: a forward pass that rounds where a bfloat16 one does, and lets gradients through.

Shapes in comments: B texts, T tokens, H heads, D head dim, E hidden, L blocks, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch.nn import functional as F

from runner.format.layout import block_tensors
from runner.model.bloom import alibi_slopes
from scripts.miniature.rows import LENGTH, Rows

EMBEDDING_ROWS = 1024  # some to spare, as the real one has
EPSILON = 1e-5
INTO_RESIDUAL = ("self_attention.dense.", "mlp.dense_4h_to_h.")


class Shape(NamedTuple):
    blocks: int
    hidden: int
    heads: int


def new_weights(shape: Shape) -> dict[str, torch.Tensor]:
    """Random weights by their names in the checkpoint; all blocks are stacked: `h.*.name` is [L, ...]."""
    hidden = shape.hidden
    weights = {"word_embeddings.weight": torch.randn(EMBEDDING_ROWS, hidden) * 0.1}
    for name in ("word_embeddings_layernorm", "ln_f"):
        weights |= {f"{name}.weight": torch.ones(hidden), f"{name}.bias": torch.zeros(hidden)}
    for name, size in block_tensors(hidden).items():
        if len(size) == 1:
            value = torch.full((shape.blocks, *size), float("layernorm.weight" in name))
        else:
            value = torch.randn(shape.blocks, *size) / math.sqrt(size[1])
            if name.startswith(INTO_RESIDUAL):
                value /= math.sqrt(2 * shape.blocks)
        weights[f"h.*.{name}"] = value
    return weights


def to_bfloat16(x: torch.Tensor) -> torch.Tensor:
    """Round float32 to bfloat16's 8 bits; the gradient passes straight through.

    Veltkamp's splitting instead of two casts: a compiler may drop a cast there and back.
    """
    with torch.no_grad():
        scaled = x * 65537.0
        step = scaled - (scaled - x) - x
    return x + step


def block(
    x: torch.Tensor, alibi: torch.Tensor, mask: torch.Tensor, w: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """One transformer block: x [B, T, E], ALiBi [B, H, 1, T] and the mask [B, 1, T, T] give [B, T, E]."""
    r = to_bfloat16
    batch, length, hidden = x.shape
    heads = alibi.shape[1]
    normed = r(F.layer_norm(x, (hidden,), w[0], w[1], EPSILON))
    fused = r(F.linear(normed, w[2], w[3])).view(batch, length, heads, 3, hidden // heads)
    q, k, v = fused.permute(3, 0, 2, 1, 4)  # each [B, H, T, D]
    scores = r(alibi + q @ k.transpose(-1, -2) / math.sqrt(hidden // heads))  # [B, H, T, T]
    seen = r(r(torch.softmax(scores + mask, dim=-1)) @ v).transpose(1, 2).reshape(batch, length, hidden)
    x = r(x + r(F.linear(seen, w[4], w[5])))
    normed = r(F.layer_norm(x, (hidden,), w[6], w[7], EPSILON))
    inner = r(F.gelu(r(F.linear(normed, w[8], w[9])), approximate="tanh"))
    return r(x + r(F.linear(inner, w[10], w[11])))


compiled_block = torch.compile(block, dynamic=False)


def forward(
    weights: dict[str, torch.Tensor], rows: Rows, heads: int, without: Collection[int] = ()
) -> torch.Tensor:
    """Rows of B x T tokens to the last hidden states [B, T, E]; the blocks `without` are left out."""
    r = to_bfloat16
    weights = {name: r(value) for name, value in weights.items()}
    embedding = weights["word_embeddings.weight"]
    size = embedding.shape[1:]
    # By the key's place, as in BLOOM.
    alibi = r(alibi_slopes(heads)[:, None, None] * rows.place[:, None, None])
    hidden = (rows.owner[:, :, None] != rows.owner[:, None]) | torch.ones(LENGTH, LENGTH).triu(1).bool()
    mask = torch.zeros(hidden.shape).masked_fill(hidden, -1e9)[:, None]
    norm = weights["word_embeddings_layernorm.weight"], weights["word_embeddings_layernorm.bias"]
    x = r(F.layer_norm(F.embedding(rows.ids, embedding), size, *norm, EPSILON))
    stacked = [weights[f"h.*.{name}"].unbind(0) for name in block_tensors(size[0])]
    for number, w in enumerate(zip(*stacked, strict=True)):
        if number not in without:
            x = compiled_block(x, alibi, mask, w)
    return r(F.layer_norm(x, size, weights["ln_f.weight"], weights["ln_f.bias"], EPSILON))


def answer_logits(
    weights: dict[str, torch.Tensor], rows: Rows, heads: int, without: Collection[int] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, V] and ids [N] of the N answer tokens in `rows`."""
    hidden = forward(weights, rows, heads, without)
    before = hidden[:, :-1][rows.wanted[:, 1:]]
    embedding = weights["word_embeddings.weight"]
    return F.linear(before, to_bfloat16(embedding)), rows.ids[rows.wanted]


def deepen(weights: dict[str, torch.Tensor], blocks: int) -> dict[str, torch.Tensor]:
    """Put copies after each block until there are `blocks`; together they add about what the block added."""
    deeper = {}
    for name, value in weights.items():
        if name.startswith("h.*."):
            times = blocks // len(value)
            value = value.repeat_interleave(times, dim=0)
            if name[4:].startswith(INTO_RESIDUAL):
                value = value / times
        deeper[name] = value.detach().clone()
    return deeper
