"""BLOOM as functions on tensors, in the order of operations of the reference implementation.

Reference: transformers, `models/bloom/modeling_bloom.py`; the model: https://arxiv.org/abs/2211.05100.
Every operation rounds its result to the dtype, so the grouping of the operations here decides bits and is part of the
contract: docs/architecture.md says how equality is tested.

A pass may carry rows of several sequences, one after another in x. Attention takes one sequence at a time, and every
other operation one row at a time: so each row has the bits that it has alone.

Shapes: T rows of this pass, S cached positions that they attend to, H heads, D head dim, E hidden = H * D,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from runner.format.hyperparameters import Hyperparameters
from runner.model.activations import score_rows
from runner.model.kv_cache import BlockCache, JoinedValues, Segment, whole_lanes
from runner.weights.checkpoint import Part
from runner.weights.linear import Matrix


def layer_norm(x: torch.Tensor, part: Part, prefix: str, epsilon: float) -> torch.Tensor:
    """LayerNorm over E with the vectors `prefix + 'weight'` and `prefix + 'bias'`."""
    return F.layer_norm(
        x, (x.shape[-1],), part.vectors[prefix + "weight"], part.vectors[prefix + "bias"], epsilon
    )


def linear(x: torch.Tensor, part: Part, name: str) -> torch.Tensor:
    """`x @ weight.T + bias` with the tensors of `part` under `name`."""
    return part.matrices[name + ".weight"].product(x, part.vectors[name + ".bias"])


def embed(ids: Sequence[int], part: Part, model: Hyperparameters) -> torch.Tensor:
    """ids [T] -> [T, E]. Reads only the rows of the matrix that `ids` name."""
    rows = part.matrices["word_embeddings.weight"].rows(ids)
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


def causal_mask(rows: int, length: int, padded: int, dtype: torch.dtype) -> torch.Tensor:
    """[T, S]: 0 if the row attends to the position, the dtype's lowest number if the position comes after the row.

    The last of the T rows is at position `length - 1`; `padded` is S.
    """
    future = torch.ones(rows, padded, dtype=torch.bool).triu(diagonal=length - rows + 1)
    return torch.zeros(rows, padded, dtype=dtype).masked_fill(future, torch.finfo(dtype).min)


@dataclass(frozen=True)
class AttentionMetadata:
    """Which rows of a pass belong to one sequence, and which positions each of them attends to.

    Rows `first` to `last` of x are the sequence's, and its cache stores them from position `start` on. `masks` are
    [t, S] for groups of t rows, so that the scores of a long prompt are never in memory all at once. `joined` is what
    a prefix needs, and a cache with one.
    """

    first: int
    last: int
    start: int
    masks: tuple[torch.Tensor, ...]
    joined: JoinedValues | None = None

    @classmethod
    def of(
        cls, segment: Segment, first: int, n_head: int, dtype: torch.dtype, joined: JoinedValues | None = None
    ) -> AttentionMetadata:
        """The metadata of `segment`, whose rows begin at row `first` of the pass."""
        rows, start = len(segment.ids), segment.cache.length
        step = score_rows(n_head, segment.length)
        masks = []
        for done in range(0, rows, step):
            count = min(step, rows - done)
            length = start + done + count
            masks.append(causal_mask(count, length, whole_lanes(length), dtype))
        return cls(first, first + rows, start, tuple(masks), joined)


def attend(
    fused: torch.Tensor, cache: BlockCache, attended: AttentionMetadata, alibi: torch.Tensor
) -> torch.Tensor:
    """Causal self-attention of one sequence: fused queries, keys and values [T, H, 3, D] -> [T, E].

    S may reach beyond a row's position: later positions are masked, and weigh nothing.
    """
    D = cache.head_dim
    q, k, v = (fused[:, :, i].transpose(0, 1) for i in range(3))  # 3 x [H, T, D]
    cache.write(k, v, attended.start)
    contexts, done = [], 0
    for mask in attended.masks:
        t, S = mask.shape
        products = cache.scores(q[:, done : done + t], S) * (1.0 / math.sqrt(D))  # [H, t, S]
        scores = products.add_(alibi[:, :, :S]).to(fused.dtype) + mask
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(fused.dtype)
        context = cache.context(weights, attended.joined).to(fused.dtype)
        contexts.append(context.transpose(0, 1).reshape(t, -1))
        done += t
    return contexts[0] if len(contexts) == 1 else torch.cat(contexts)


def attention(
    x: torch.Tensor,
    block: Part,
    caches: Sequence[BlockCache],
    attended: Sequence[AttentionMetadata],
    alibi: torch.Tensor,
) -> torch.Tensor:
    """Self-attention of x [T, E], each sequence's rows over its own cache -> [T, E]."""
    H, D = caches[0].n_head, caches[0].head_dim
    fused = linear(x, block, "self_attention.query_key_value").view(len(x), H, 3, D)
    contexts = [
        attend(fused[each.first : each.last], cache, each, alibi)
        for cache, each in zip(caches, attended, strict=True)
    ]
    context = contexts[0] if len(contexts) == 1 else torch.cat(contexts)
    return linear(context, block, "self_attention.dense")


def gelu(x: torch.Tensor) -> torch.Tensor:
    """The tanh approximation, with the constants and the grouping of the reference implementation."""
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


def mlp(x: torch.Tensor, block: Part) -> torch.Tensor:
    """x [T, E] -> [T, E] through 4E."""
    return linear(gelu(linear(x, block, "mlp.dense_h_to_4h")), block, "mlp.dense_4h_to_h")


def block_forward(
    x: torch.Tensor,
    block: Part,
    caches: Sequence[BlockCache],
    attended: Sequence[AttentionMetadata],
    alibi: torch.Tensor,
    model: Hyperparameters,
) -> torch.Tensor:
    """One transformer block: x [T, E] -> [T, E], with the cache and the attention metadata of each sequence.

    The residual is x itself or, in a few models, the LayerNorm of x.
    """
    after_norm = model.apply_residual_connection_post_layernorm

    normed = layer_norm(x, block, "input_layernorm.", model.layer_norm_epsilon)
    x = (normed if after_norm else x) + attention(normed, block, caches, attended, alibi)

    normed = layer_norm(x, block, "post_attention_layernorm.", model.layer_norm_epsilon)
    return (normed if after_norm else x) + mlp(normed, block)


def head(x: torch.Tensor, final_layernorm: Part, matrix: Matrix, epsilon: float) -> torch.Tensor:
    """x [T, E] -> logits [T, V]; the output matrix is the embedding itself, never a copy."""
    return matrix.product(layer_norm(x, final_layernorm, "", epsilon))
