"""BLOOM as functions on tensors, in the order of operations of the reference implementation.

Reference: transformers, `models/bloom/modeling_bloom.py`; the model: https://arxiv.org/abs/2211.05100.
Where a result is rounded (to bfloat16 after every operation) decides bits, so the grouping of the operations
here is part of the contract: docs/architecture.md says how equality is tested.

Shapes: T rows of this pass, S positions in the cache with these rows included, H heads, D head dim, E hidden = H * D,
V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from runner.kv_cache import BlockCache
from runner.prepared import Hyperparameters
from runner.weights import Tensors


def layer_norm(x: torch.Tensor, part: Tensors, prefix: str, epsilon: float) -> torch.Tensor:
    """LayerNorm over E with `part[prefix + 'weight']` and `part[prefix + 'bias']`."""
    return F.layer_norm(x, (x.shape[-1],), part[prefix + "weight"], part[prefix + "bias"], epsilon)


def linear(x: torch.Tensor, part: Tensors, name: str) -> torch.Tensor:
    """`x @ weight.T + bias` with the tensors of `part` under `name`."""
    return F.linear(x, part[name + ".weight"], part[name + ".bias"])


def embed(ids: torch.Tensor, part: Tensors, model: Hyperparameters) -> torch.Tensor:
    """ids [T] -> [T, E]. Touches only the rows of the matrix that `ids` name."""
    rows = F.embedding(ids, part["word_embeddings.weight"])
    return layer_norm(rows, part, "word_embeddings_layernorm.", model.layer_norm_epsilon)


def alibi_slopes(n_head: int) -> torch.Tensor:
    """[H] float32: the slope of each head's distance penalty (https://arxiv.org/abs/2108.12409).

    A geometric sequence for a power of two; otherwise that of the next lower power of two, followed by every
    other slope of the next higher one.
    """

    def geometric(n: int, powers: torch.Tensor) -> torch.Tensor:
        return torch.pow(torch.tensor(2 ** -(2 ** -(math.log2(n) - 3)), dtype=torch.float32), powers)

    lower = 2 ** math.floor(math.log2(n_head))
    slopes = geometric(lower, torch.arange(1, 1 + lower, dtype=torch.int32))
    if lower == n_head:
        return slopes
    odd = torch.arange(1, 1 + 2 * (n_head - lower), 2, dtype=torch.int32)
    return torch.cat([slopes, geometric(2 * lower, odd)])


def alibi_bias(n_head: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """[H, 1, S]: slope times absolute position; softmax makes it the distance to the query's position."""
    return (alibi_slopes(n_head)[:, None, None] * torch.arange(length)).to(dtype)


def causal_mask(rows: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """[T, S]: 0 where the row may look, the dtype's lowest number where the position lies after it."""
    future = torch.ones(rows, length, dtype=torch.bool).triu(diagonal=length - rows + 1)
    return torch.zeros(rows, length, dtype=dtype).masked_fill(future, torch.finfo(dtype).min)


def attention(
    x: torch.Tensor, block: Tensors, cache: BlockCache, alibi: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Causal self-attention of x [T, E] over the S cached positions, of which its own are the last -> [T, E]."""
    T, S = mask.shape
    H, _, D = cache.keys.shape
    fused = linear(x, block, "self_attention.query_key_value").view(T, H, 3, D)
    q, k, v = (fused[:, :, i].transpose(0, 1) for i in range(3))  # 3 x [H, T, D]
    k, v = cache.write(k, v, start=S - T)  # 2 x [H, S, D]
    scores = torch.baddbmm(alibi, q, k.transpose(1, 2), alpha=1.0 / math.sqrt(D)) + mask  # [H, T, S]
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(x.dtype)
    context = torch.bmm(weights, v).transpose(0, 1).reshape(x.shape)  # [H, T, D] -> [T, E]
    return linear(context, block, "self_attention.dense")


def gelu(x: torch.Tensor) -> torch.Tensor:
    """The tanh approximation, with the constants and the grouping of the reference implementation."""
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


def mlp(x: torch.Tensor, block: Tensors) -> torch.Tensor:
    """x [T, E] -> [T, E] through 4E."""
    return linear(gelu(linear(x, block, "mlp.dense_h_to_4h")), block, "mlp.dense_4h_to_h")


def block_forward(
    x: torch.Tensor,
    block: Tensors,
    cache: BlockCache,
    alibi: torch.Tensor,
    mask: torch.Tensor,
    model: Hyperparameters,
) -> torch.Tensor:
    """One transformer block: x [T, E] -> [T, E].

    The residual is x itself or, as a few models have it, what the LayerNorm made of x.
    """
    after_norm = model.apply_residual_connection_post_layernorm

    normed = layer_norm(x, block, "input_layernorm.", model.layer_norm_epsilon)
    x = (normed if after_norm else x) + attention(normed, block, cache, alibi, mask)

    normed = layer_norm(x, block, "post_attention_layernorm.", model.layer_norm_epsilon)
    return (normed if after_norm else x) + mlp(normed, block)


def head(x: torch.Tensor, final_layernorm: Tensors, embedding: Tensors, epsilon: float) -> torch.Tensor:
    """x [T, E] -> logits [T, V]; the output matrix is the embedding, used where it lies."""
    return F.linear(layer_norm(x, final_layernorm, "", epsilon), embedding["word_embeddings.weight"])
