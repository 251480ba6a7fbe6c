"""The memory that a pass needs beside weights and caches: its activations, and the scores of its attention."""

from __future__ import annotations

from runner.format.hyperparameters import Hyperparameters

# Bytes for each element, more than what a product's rows and its float32 sums take: an upper bound.
BYTES_BY_FEATURE = 14
BYTES_BY_SCORE = 14
# The scores of a long prompt are computed in groups of rows of at most this size, or of a few rows.
SCORE_BYTES = 64 * 2**20
LEAST_SCORE_ROWS = 4


def score_rows(n_head: int, length: int) -> int:
    """Number of rows of a sequence whose scores over `length` positions are computed at a time."""
    return max(LEAST_SCORE_ROWS, SCORE_BYTES // max(1, n_head * length * BYTES_BY_SCORE))


def activation_bytes(
    model: Hyperparameters, rows: int, length: int, element_size: int, logit_rows: int = 1
) -> int:
    """Upper bound in bytes for a pass of `rows` rows, each over up to `length` positions.

    `logit_rows` of the rows give logits.
    """
    widest = rows * 4 * model.hidden_size * BYTES_BY_FEATURE
    scores = model.n_head * min(rows, score_rows(model.n_head, length)) * length * BYTES_BY_SCORE
    states = 8 * rows * model.hidden_size * element_size
    return max(widest, scores) + states + 8 * logit_rows * model.vocab_size
