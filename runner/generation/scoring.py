"""Log-probabilities of tokens, by the model's own logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runner.generation.noise import exp, log
from runner.kernel.threads import one_thread


@dataclass(frozen=True)
class TokenScore:
    """The log-probability of a token, and the likeliest tokens at its place with theirs, the likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    @property
    def is_greedy(self) -> bool:
        """Whether it is the likeliest token; needs at least one of `top`."""
        return self.token == self.top[0][0]


def log_probabilities(row: torch.Tensor) -> torch.Tensor:
    """Log-softmax of a row of logits [V], float32, with the same bits on every processor.

    The sum is taken in float64 from the first token to the last.
    """
    scores = row.float()
    scores = scores - scores.max()
    total = exp(scores.double()).cumsum(0)[-1:]
    return (scores.double() - log(total)).float()


@one_thread()
def score(row: torch.Tensor, token: int, top: int = 0) -> TokenScore:
    """The score of `token` at the place of a row of logits [V], with those of the `top` likeliest tokens.

    Of tokens that are equally likely the one with the lowest id comes first.
    """
    found, logits = log_probabilities(row), row.float()
    # By the logits, as the likeliest token is chosen: log-probabilities are rounded once more.
    ids = torch.sort(logits, descending=True, stable=True).indices if top > 1 else logits.argmax()[None]
    best = ids[:top].tolist()
    return TokenScore(token, float(found[token]), tuple((each, float(found[each])) for each in best))


def as_json(scores: Sequence[TokenScore]) -> list[dict[str, object]]:
    """One object for each token: its id, its log-probability, and the likeliest ones."""
    return [
        {
            "id": each.token,
            "logprob": each.logprob,
            "top": [{"id": token, "logprob": logprob} for token, logprob in each.top],
        }
        for each in scores
    ]
