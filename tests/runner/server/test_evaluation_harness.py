"""What lm-evaluation-harness's local-completions sends by ids, eight at a time, and how it reads the answers.

The bodies and the readings are those of its `LocalCompletionsAPI`; `scripts.bench.evaluation` runs the harness itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from runner.generation.model import Model
from runner.generation.options import Sampling
from runner.generation.scorer import Text
from runner.server.settings import Settings
from tests.support.serving import Exchange, serving

NAME, SEED = "mini", 1234
TEXTS = [
    ("The quick brown fox", " jumps over the lazy dog"),
    ("The quick brown fox", " sleeps"),
    ("日本語 の", " text"),
    ("A", " b c d e f g h i j k l m n o p q r s t u v w x y z"),
    ("One two three four five six seven eight nine ten", " eleven"),
    ("def f(x):\n", "    return x\n"),
    ("Is it naïve?", " No"),
    ("The end", "."),
]


def scored_body(ids: Sequence[int]) -> dict[str, Any]:
    """A log-likelihood: the text and its continuation, scored, and one token more, which nobody asked for."""
    return {
        "model": NAME,
        "prompt": [ids],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": SEED,
        "echo": True,
    }


def continued_body(ids: Sequence[int], max_tokens: int, until: Sequence[str]) -> dict[str, Any]:
    return {
        "prompt": [ids],
        "model": NAME,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stop": until,
        "seed": SEED,
    }


def read_logprobs(document: Any, context: int) -> tuple[float, bool]:
    """Log-likelihood of what follows so many tokens, and whether it is what a greedy model says."""
    (choice,) = sorted(document["choices"], key=lambda each: each["index"])
    scores = choice["logprobs"]["token_logprobs"][context:-1]
    top = choice["logprobs"]["top_logprobs"][context:-1]
    is_greedy = all(score == max(each.values()) for score, each in zip(scores, top, strict=True))
    return sum(scores), is_greedy


def answered(model: Model, bodies: Sequence[dict[str, Any]]) -> list[Any]:
    """The documents of requests that are there at once."""

    async def ask() -> list[Any]:
        async with serving(model, Settings(model_name=NAME)) as (app, _):
            exchanges = [Exchange(app, "/v1/completions", body) for body in bodies]
            found = [await exchange.document() for exchange in exchanges]
            assert [exchange.status for exchange in exchanges] == [200] * len(bodies)
            return found

    return asyncio.run(asyncio.wait_for(ask(), 60))


def test_log_likelihoods_are_the_runner_s_own(model: Model) -> None:
    contexts = [model.tokenizer.encode(context) for context, _ in TEXTS]
    wholes = [model.tokenizer.encode(context + continuation) for context, continuation in TEXTS]
    # The model is random, so one continuation is made to be its own.
    wholes[0] = [*contexts[0], *model.generate(contexts[0], max_new_tokens=5)]
    texts = [Text(number, ids, len(contexts[number])) for number, ids in enumerate(wholes)]
    own = sorted(model.scorer(texts).run(), key=lambda each: each.number)
    expected = [(sum(each.logprob for each in text.scores), text.is_greedy) for text in own]
    found = answered(model, [scored_body(ids) for ids in wholes])
    for document, ids in zip(found, wholes, strict=True):
        logprobs = document["choices"][0]["logprobs"]
        assert [len(column) for column in logprobs.values()] == [len(ids) + 1] * 4
    read = [read_logprobs(each, len(context)) for each, context in zip(found, contexts, strict=True)]
    assert read == expected and [is_greedy for _, is_greedy in read] == [True] + [False] * 7


def test_continuations_are_the_runner_s_own(model: Model) -> None:
    prompts = [model.tokenizer.encode(context) for context, _ in TEXTS]
    for until in (["a", "\n\n"], []):
        sampling = Sampling(stop=tuple(until))
        own = model.generate_all(prompts, max_new_tokens=20, sampling=sampling)
        expected = [model.text(each) for each in sorted(own, key=lambda each: each.index)]
        found = answered(model, [continued_body(ids, 20, until) for ids in prompts])
        assert [each["choices"][0]["text"] for each in found] == expected
