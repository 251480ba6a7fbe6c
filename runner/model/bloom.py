"""BLOOM as functions on tensors, in the order of operations of the reference implementation.

Reference: transformers, `models/bloom/modeling_bloom.py`; the model: https://arxiv.org/abs/2211.05100.
Every operation rounds its result to the dtype, so the grouping of the operations decides bits and is part of the
contract: docs/architecture.md says how equality is tested. All of them are in kernel.c: tensors here are float32, with
numbers that the dtype has, and torch is their memory.

A pass may carry rows of several sequences, one after another in x. Attention takes one sequence at a time, and every
other operation one row at a time: so each row has the bits that it has alone.

Shapes: T rows of this pass, S cached positions that they attend to, H heads, D head dim, E hidden, V vocabulary.
H are the heads of this process, and E = H * D if it is alone; `gather` has what others compute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from runner.format.hyperparameters import Hyperparameters
from runner.kernel import operations
from runner.kernel.matmul import Finish
from runner.model.activations import score_rows
from runner.model.gather import Gather
from runner.model.kv_cache import BlockCache, JoinedValues, Segment, whole_lanes
from runner.weights.checkpoint import Part
from runner.weights.linear import Matrix


def layer_norm(x: torch.Tensor, part: Part, prefix: str, model: Hyperparameters) -> torch.Tensor:
    """LayerNorm over E with the vectors `prefix + 'weight'` and `prefix + 'bias'`."""
    weight, bias = part.vectors[prefix + "weight"], part.vectors[prefix + "bias"]
    return operations.layer_norm(part.kernel, x, weight, bias, model.layer_norm_epsilon)


def linear(x: torch.Tensor, part: Part, name: str, gather: Gather, **more: Any) -> torch.Tensor:
    """`x @ weight.T + bias` with the tensors of `part` under `name`; `more` follows, see `Finish`."""
    matrix = name + ".weight"
    return gather.product(part.matrices[matrix], matrix, x, Finish(part.vectors[name + ".bias"], **more))


def embed(ids: Sequence[int], part: Part, model: Hyperparameters, gather: Gather) -> torch.Tensor:
    """ids [T] -> [T, E]. Reads only the rows of the matrix that `ids` name."""
    rows = gather.embed(part.matrices["word_embeddings.weight"], ids).float()
    return layer_norm(rows, part, "word_embeddings_layernorm.", model)


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
    """[H, S]: slope times absolute position; softmax makes it the distance to the query's position."""
    return (alibi_slopes(n_head)[:, None] * torch.arange(length)).to(dtype).float()


@dataclass(frozen=True)
class AttentionMetadata:
    """Which rows of a pass belong to one sequence, and which positions each of them attends to.

    Rows `first` to `last` of x are the sequence's, and its cache stores them from position `start` on. The scores of
    `step` rows are in memory at a time. `joined` is what a prefix needs, and a cache with one.
    """

    first: int
    last: int
    start: int
    step: int
    joined: JoinedValues | None = None

    @classmethod
    def of(
        cls, segment: Segment, first: int, n_head: int, joined: JoinedValues | None = None
    ) -> AttentionMetadata:
        """The metadata of `segment`, whose rows begin at row `first` of the pass."""
        step = score_rows(n_head, segment.length)
        return cls(first, first + len(segment.ids), segment.cache.length, step, joined)


def attend(
    fused: torch.Tensor,
    cache: BlockCache,
    attended: AttentionMetadata,
    alibi: torch.Tensor,
    context: torch.Tensor,
) -> None:
    """Causal self-attention of one sequence: queries, keys and values `fused` [T, H, 3, D] -> `context` [T, H, D].

    S may reach beyond a row's position: later positions are masked, and weigh nothing.
    """
    cache.store(fused, attended.start)
    queries, out = fused[:, :, 0].transpose(0, 1), context.transpose(0, 1)  # [H, T, D]
    for done in range(0, len(fused), attended.step):
        rows = slice(done, min(done + attended.step, len(fused)))
        weights = cache.scores(queries[:, rows], whole_lanes(attended.start + rows.stop))  # [H, t, S]
        scale = 1.0 / math.sqrt(cache.head_dim)
        operations.attend(cache.kernel, weights, alibi, attended.start + done, scale)
        cache.context(weights, out[:, rows], attended.joined)


def attention(
    x: torch.Tensor,
    residual: torch.Tensor,
    block: Part,
    caches: Sequence[BlockCache],
    attended: Sequence[AttentionMetadata],
    alibi: torch.Tensor,
    gather: Gather,
) -> torch.Tensor:
    """`residual` [T, E] plus self-attention of x [T, E], each sequence's rows over its own cache -> [T, E]."""
    T, H, D = len(x), caches[0].n_head, caches[0].head_dim
    own = Finish(block.vectors["self_attention.query_key_value.bias"])
    fused = block.matrices["self_attention.query_key_value.weight"].product(x, own).view(T, H, 3, D)
    context = torch.empty(T, H, D)
    for cache, each in zip(caches, attended, strict=True) if H else ():
        rows = slice(each.first, each.last)
        attend(fused[rows], cache, each, alibi, context[rows])
    whole = gather.context(context.view(T, H * D))
    return linear(whole, block, "self_attention.dense", gather, residual=residual)


def mlp(x: torch.Tensor, residual: torch.Tensor, block: Part, gather: Gather) -> torch.Tensor:
    """`residual` [T, E] plus the MLP of x [T, E], through 4E and GELU -> [T, E]."""
    hidden = linear(x, block, "mlp.dense_h_to_4h", gather, activates=True)
    return linear(hidden, block, "mlp.dense_4h_to_h", gather, residual=residual)


def block_forward(
    x: torch.Tensor,
    block: Part,
    caches: Sequence[BlockCache],
    attended: Sequence[AttentionMetadata],
    alibi: torch.Tensor,
    model: Hyperparameters,
    gather: Gather,
) -> torch.Tensor:
    """One transformer block: x [T, E] -> [T, E], with the cache and the attention metadata of each sequence.

    The residual is x itself or, in a few models, the LayerNorm of x.
    """
    after_norm = model.apply_residual_connection_post_layernorm

    normed = layer_norm(x, block, "input_layernorm.", model)
    x = attention(normed, normed if after_norm else x, block, caches, attended, alibi, gather)

    normed = layer_norm(x, block, "post_attention_layernorm.", model)
    return mlp(normed, normed if after_norm else x, block, gather)


def head(
    x: torch.Tensor, final_layernorm: Part, matrix: Matrix, model: Hyperparameters, gather: Gather
) -> torch.Tensor:
    """x [T, E] -> logits [T, V]; the output matrix is the embedding itself, never a copy."""
    return gather.logits(matrix, layer_norm(x, final_layernorm, "", model))
